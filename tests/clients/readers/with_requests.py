"""Lê o streaming com requests e escreve cada objeto, numa linha, assim que ele chega."""

import json
import sys

import requests

with requests.post(sys.argv[1], data="{}", stream=True, timeout=60) as response:
    # O padrão de chunk_size, 512, é lento com linhas longas. Um maior não retém as curtas, que vêm em chunks.
    for line in response.iter_lines(chunk_size=2**16):
        print(json.dumps(json.loads(line)), flush=True)
