"""Cada sintoma da seção "Sintomas" do README, reproduzido pela causa que ela lhe dá, e o remédio."""

import gzip
import re
import socket
import subprocess

import harness
import support

troubles = re.search(r"## Sintomas\n(.*?)\n## ", (harness.root / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def row(symptom):
    """Acha a linha da tabela de um sintoma.

    Argumentos:
        symptom: o começo dela.

    Retorno:
        O texto da linha.
    """
    found = [line for line in troubles.splitlines() if line.startswith(f"| {symptom}")]
    assert len(found) == 1, (symptom, found)
    return found[0]


def is_listening(port):
    """Diz se há quem escute numa porta. Argumentos: port. Retorno: bool."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_lines_reversed(share_proxy, connect, worker):
    """LPUSH, que é o Push do n8n sem Tail, inverte o que se acumula; RPUSH não."""
    assert "LPUSH" in row("As linhas chegam na ordem inversa")
    response, task = support.open_stream(connect, share_proxy(), worker)
    with task.client.pipeline(transaction=True) as pipe:
        pipe.lpush(task.list, "1", "2", "3")
        pipe.delete(task.key)
        pipe.execute()
    assert response.lines() == [b"3", b"2", b"1"]
    response, task = support.open_stream(connect, share_proxy(), worker)
    task.finish("1", "2", "3")
    assert response.lines() == [b"1", b"2", b"3"]


def test_nothing_comes(start_proxy, connect, worker, db, redis_main):
    """Lista de outro nome ou de outro database: nada chega, e MAXTIME encerra. (Ninguém no canal: test_stream.)"""
    text = row("Nada chega")
    assert "ninguém ouve o canal" in text and "task_list" in text and "database" in text
    proxy = start_proxy("-t", 600)
    response, task = support.open_stream(connect, proxy, worker)
    other = redis_main.client(db=2)
    other.rpush(task.list, "no database 2")
    db.rpush("ndjson_list_", "sem o nome da tarefa")
    assert response.lines() == [b'{"error": "timeout"}']
    other.flushdb()
    db.delete("ndjson_list_")


def test_ends_too_early(share_proxy, connect, worker):
    """A chave apagada antes da última parte, e uma palavra de fim nua no meio: o resto não chega."""
    text = row("A resposta acaba cedo demais")
    assert "DEL" in text and "EOF" in text and "MAXTIME" in text
    response, task = support.open_stream(connect, share_proxy(), worker)
    task.push("antes")
    assert response.line() == b"antes"
    task.delete()
    assert response.lines() == []
    task.gone()
    task.push("depois")
    assert task.client.delete(task.list) == 1
    response, task = support.open_stream(connect, share_proxy(), worker)
    task.push("antes", "EOF", "depois")
    assert response.lines() == [b"antes"]


def test_ends_with_timeout(start_proxy, connect, worker):
    """Um silêncio maior que MAXTIME termina em MAXTIME_ERROR; com MAXTIME maior, o mesmo silêncio passa."""
    assert "MAXTIME" in row('A última linha é `{"error": "timeout"}`')
    for limit, lines in ((500, [b'{"error": "timeout"}']), (20000, [b"2"])):
        response, task = support.open_stream(connect, start_proxy("-t", limit), worker)
        task.push("1")
        assert response.line() == b"1"
        response.conn.silent(0.3)
        if limit == 20000:
            response.conn.silent(0.5)
            task.finish("2")
        assert response.lines() == lines


def test_lines_all_at_once(start_proxy, connect, worker, tmp_path):
    """Um nginx que comprime e ignora X-Accel-Buffering retém a resposta até o fim; sem isso, linha a linha."""
    assert "X-Accel-Buffering" in row("As linhas chegam todas de uma vez")
    proxy = start_proxy()
    for extra in ("proxy_ignore_headers X-Accel-Buffering; gzip on; gzip_types *; gzip_min_length 0;", ""):
        port = harness.free_port()
        path = tmp_path / "nginx.conf"
        path.write_text(
            f"daemon off; master_process off; error_log stderr; pid {tmp_path}/nginx.pid; events {{}} "
            f"http {{ access_log off; client_body_temp_path {tmp_path}/a; proxy_temp_path {tmp_path}/b; "
            f"fastcgi_temp_path {tmp_path}/c; uwsgi_temp_path {tmp_path}/d; scgi_temp_path {tmp_path}/e; "
            f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{proxy.port}; "
            f"proxy_http_version 1.1; {extra} }} }} }}",
            encoding="utf-8",
        )
        nginx = subprocess.Popen(["nginx", "-p", tmp_path, "-c", path], stderr=subprocess.DEVNULL)
        try:
            harness.eventually(lambda port=port: is_listening(port), 10, "nginx")
            request = connect(port).request("POST", "/", {"Accept-Encoding": "gzip"})
            task = worker.next()
            if not extra:
                response = request.response()
                task.push("1")
                assert response.line() == b"1"
                task.finish("2")
                assert response.lines() == [b"2"]
            else:
                task.push("1")
                request.silent(1)
                task.finish("2")
                assert gzip.decompress(request.response().body()) == b"1\n2\n"
            request.close()
        finally:
            nginx.terminate()
            nginx.wait(10)


def test_statuses():
    """As linhas dos status dizem as causas que test_limits, test_redis e test_auth provam."""
    assert "Redis fora do ar" in row("504") and "MAX_STREAMS" in row("503") and "AUTH_TOKEN" in row("401")
