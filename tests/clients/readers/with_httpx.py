"""Lê o streaming com httpx e escreve cada objeto, numa linha, assim que ele chega."""

import json
import sys

import httpx

# O prazo padrão, de 5 s, vale para o silêncio entre duas linhas.
with httpx.stream("POST", sys.argv[1], content="{}", timeout=60) as response:
    for line in response.iter_lines():
        print(json.dumps(json.loads(line)), flush=True)
