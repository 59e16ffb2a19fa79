"""A frota: nginx na frente de três proxies e dois workers, um proxy morto no meio. A forma longa é tests/bench/fleet."""

import json
import os
import subprocess
import sys

import harness

script = harness.root / "tests" / "bench" / "fleet.py"
config = harness.root / "packaging" / "examples" / "nginx-fleet.conf"


def run_fleet(folder, tasks, host, nginx=config):
    """Roda a prova da frota.

    Argumentos:
        folder: pasta da prova.
        tasks: quantas tarefas.
        host: HTTP_SERVER dos proxies.
        nginx: configuração do nginx.

    Retorno:
        Par (código de saída, números).
    """
    numbers = folder / "fleet.json"
    passed_on = {name: os.environ[name] for name in ("REDIS_BINARY",) if name in os.environ}
    done = subprocess.run(
        [sys.executable, script, "--tasks", str(tasks), "--host", host, "--nginx", nginx, "--json", numbers],
        env={**harness.base_environment(), "JSON_PROXY": str(harness.program), **passed_on},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert numbers.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(numbers.read_text(encoding="utf-8"))


def test_fleet(tmp_path):
    """Toda tarefa que não estava no proxy morto chega inteira e uma vez só; as dele se quebram, e as chaves vencem.

    Num hospedeiro só, e o defeito abaixo no outro: de uma morte, o hospedeiro não participa.
    """
    status, told = run_fleet(tmp_path, 300, "waitress")
    assert (status, told["failures"]) == (0, [])
    assert told["whole"] + told["broken"] == 300
    assert told["unheard"] < told["broken"] < told["proxies"][0]
    assert told["after"] > 0
    assert told["caught"]["sent"] > 0
    assert [told[name] for name in ("short", "lost", "doubled", "foreign", "resent")] == [0, 0, 0, 0, []]


def test_fleet_notices_a_wrong_configuration(tmp_path):
    """Sem as duas linhas que a configuração de exemplo diz serem indispensáveis, a prova da frota falha, e diz por quê.

    Em HTTP/1.0 a morte do proxy parece um fim limpo; com non_idempotent, o nginx reenvia o que já fez uma tarefa.
    """
    text = config.read_text(encoding="utf-8")
    for right, wrong in (
        ("proxy_http_version 1.1;", "proxy_http_version 1.0;"),
        ("proxy_next_upstream error timeout;", "proxy_next_upstream error timeout non_idempotent;"),
    ):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    nginx = tmp_path / "wrong.conf"
    nginx.write_text(text, encoding="utf-8")
    status, told = run_fleet(tmp_path, 120, "flask", nginx)
    assert status == 1
    assert told["short"] > 0
    assert told["resent"]
    assert any("reenviadas" in text for text in told["failures"])
