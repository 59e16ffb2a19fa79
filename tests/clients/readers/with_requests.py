"""Lê o streaming com requests e escreve cada objeto, numa linha, assim que ele chega."""

import json
import sys

import requests

with requests.post(sys.argv[1], data="{}", stream=True, timeout=60) as response:
    # O padrão de chunk_size é 512: quem lê de um intermediário que junta pedaços não deve mudá-lo para mais.
    for line in response.iter_lines():
        print(json.dumps(json.loads(line)), flush=True)
