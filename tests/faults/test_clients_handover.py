"""O soquete que troca de dono: da linha de execução que leu o pedido ao laço que cuida de todos os streams."""

import contextlib

import hostile
import peers
import support


def test_bytes_after_the_request(start_proxy, host, connect, worker):
    """1 cliente que não para de enviar: o que vem depois do pedido não vira pedido, não ocupa memória, não atrasa nem corta o
    streaming, e não esconde a saída dele."""
    proxy = start_proxy("-P", 0)
    peers.warm(proxy)
    before = proxy.memory()
    talks = [connect(proxy), connect(proxy)]
    pairs = []
    for conn in talks:
        # No mesmo segmento do pedido, e depois dele.
        conn.send(b"POST /um HTTP/1.1\r\nHost: proxy.test\r\nContent-Length: 2\r\n\r\nab" + hostile.hidden)
        pairs.append((conn.response(), worker.next()))
        assert pairs[-1][1].info["body"] == "ab"
    for response, task in pairs:
        for number in range(20):
            response.conn.send(hostile.hidden)
            task.push(str(number))
            assert response.line(3) == str(number).encode()
        # Até 32 MB, se o proxy os lê; senão, o que couber nos soquetes.
        response.conn.sock.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            for _ in range(32):
                response.conn.sock.sendall(b"x" * 2**20)
        task.push("depois")
        assert response.line(3) == b"depois"
    grown = proxy.memory() - before
    assert grown < 16384, f"{grown} KiB a mais"
    (response, task), (other, other_task) = pairs
    task.finish("fim")
    assert response.lines() == [b"fim"]
    other.conn.close()
    other_task.gone(2)
    assert support.finished_row(proxy, other_task)["fim"] == "cliente"
    worker.idle()
