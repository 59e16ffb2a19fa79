#!/usr/bin/env python3
"""Worker de exemplo do py-ndjson-proxy que fala o protocolo do Ollama: o cliente é qualquer um dos dele.

O resto (Redis, fila, posse, quedas) é o de ../worker.py. Para fazer o seu, troque a função reply().
"""
import datetime
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import worker

model = "eco:latest"            # o nome que /api/tags anuncia; qualquer outro também é atendido


def reply(request):
    """TROQUE ESTA. Recebe o pedido do cliente, um dict; produz os pedaços do texto da resposta."""
    messages = request.get("messages") or [{"content": request.get("prompt")}]
    for word in (messages[-1].get("content") or "").split():
        time.sleep(worker.DELAY)
        yield word + " "


def answer(task):
    """Recebe o dict da tarefa; produz as linhas que o Ollama daria, cada uma um objeto."""
    kind = task["path"].rpartition("/api/")[2]
    now = datetime.datetime.now(datetime.UTC).isoformat()
    if kind == "version":
        yield {"version": "0.0.0"}
    elif kind == "tags":
        yield {"models": [{"name": model, "model": model, "modified_at": now, "size": 0, "digest": "", "details": {}}]}
    elif kind == "/":
        yield "Ollama is running"
    elif kind not in ("chat", "generate"):
        yield {"error": f"{task['path']}: este worker não atende"}
    else:
        request = json.loads(task["body"])
        head = {"model": request.get("model", model), "created_at": now}

        def part(text, **rest):
            """Recebe um pedaço do texto e os campos que vêm com ele. Retorna o objeto da linha."""
            content = {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"response": text}
            return {**head, **content, **rest}

        pieces, last = reply(request), {"done": True, "done_reason": "stop"}
        if request.get("stream", True):
            for piece in pieces:
                yield part(piece, done=False)
            yield part("", **last)
        else:                   # uma linha só: o cliente lê a resposta inteira como um JSON
            yield part("".join(pieces), **last)


if __name__ == "__main__":
    worker.answer = answer
    worker.main()
