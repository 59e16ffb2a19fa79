"""Lê o streaming com aiohttp e escreve cada objeto, numa linha, assim que ele chega."""

import asyncio
import json
import sys

import aiohttp


async def main():
    """Lê tudo."""
    # O maior tamanho de uma linha é algumas vezes read_bufsize (64 KiB se não for dado).
    session = aiohttp.ClientSession(read_bufsize=2**23)
    async with session, session.post(sys.argv[1], data="{}") as response:
        async for line in response.content:
            print(json.dumps(json.loads(line)), flush=True)


asyncio.run(main())
