"""Lê o streaming só com a biblioteca padrão do Python e escreve cada objeto, numa linha, assim que ele chega."""

import json
import sys
import urllib.request

with urllib.request.urlopen(sys.argv[1], data=b"{}", timeout=60) as response:
    for line in response:
        print(json.dumps(json.loads(line)), flush=True)
