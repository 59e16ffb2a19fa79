"""O compose e a receita da imagem, presos ao programa. Quem constrói e roda a imagem é packaging/test-debian."""

import re

import pytest
import yaml

import harness

folder = harness.root / "packaging" / "container"
recipe = (folder / "Containerfile").read_text(encoding="utf-8")
defaults = {row.name: row.default for row in harness.load_program().settings}


@pytest.mark.parametrize("suggested", [False, True], ids=["as-it-is", "uncommented"])
def test_compose(suggested):
    """O que o compose cita existe: configurações, serviços, volumes, receita, porta; também com o que ele só sugere."""
    text = (folder / "compose.yaml").read_text(encoding="utf-8")
    if suggested:
        text = re.sub(r"(?m)^( *)# ( *[\w-]+:( .*)?)$", r"\1\2", text)
    compose = yaml.safe_load(text)
    services = compose["services"]
    proxy = services["proxy"]
    assert sorted(services) == ["n8n", "proxy", "valkey"][not suggested :]
    assert len(proxy["environment"]) == 2 + 2 * suggested
    assert set(proxy["environment"]) <= set(defaults)
    host, rest = proxy["environment"]["REDIS_SERVER"].split(":")
    assert host in services and f"127.0.0.1:{rest}" == defaults["REDIS_SERVER"]
    assert "healthcheck" in services[host] and set(proxy["depends_on"]) == {host}
    build = proxy["build"]
    assert (folder / build["context"]).resolve() == harness.root
    assert harness.root / build["dockerfile"] == folder / "Containerfile"
    assert int(proxy["stop_grace_period"].rstrip("s")) * 1000 > int(defaults["DRAIN"])
    for service in services.values():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")
    assert proxy["ports"] == [f"127.0.0.1:{defaults['HTTP_PORT']}:{defaults['HTTP_PORT']}"]
    assert [volume.split(":")[1] for volume in proxy.get("volumes", ())] == [defaults["ENV_FILE"]] * suggested
    assert {volume.split(":")[0] for volume in services.get("n8n", {}).get("volumes", ())} == set(compose.get("volumes", ()))


def test_recipe():
    """A receita só põe configurações que existem, com o padrão delas, e abre a porta que a prova de saúde usa."""
    environment = dict(re.findall(r"(?m)^ENV (\w+)=(.*)$", recipe))
    assert environment == {"HTTP_PORT": defaults["HTTP_PORT"]}
    assert re.findall(r"(?m)^EXPOSE (.*)$", recipe) == [defaults["HTTP_PORT"]]
    assert set(re.findall(r"environ\['(\w+)'\]", recipe)) == set(environment)
    assert set(re.findall(r"-e ([A-Z_]+)=\d", recipe)) <= set(defaults)
    assert f":{defaults['ENV_FILE']}:ro" in recipe
