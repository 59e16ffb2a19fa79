"""Os intermediários de verdade, iniciados como processos com a configuração que packaging/examples entrega.

Cada um roda com a configuração geral do Debian (sem o que supõe um serviço do sistema: contas, caminhos de log, soquete
de administração) mais o arquivo entregue, em que só as portas mudam. O prazo de silêncio, que é de um minuto, pode ser
encurtado para as provas que o esgotam.
"""

import pathlib
import re
import shutil

import harness

examples = harness.root / "packaging" / "examples"

# As portas e o prazo como estão nos arquivos entregues.
front_port = "8080"
proxy_port = "8771"


class balancer(harness.background):
    """Um intermediário à frente de um proxy, numa porta livre de 127.0.0.1."""

    # Nome do executável e do arquivo entregue, o prazo de silêncio nele, e o mesmo com N segundos.
    program = ""
    shipped = ""
    timeout_text = ""
    timeout_form = ""

    def __init__(self, folder, target, timeout=None, edits=()):
        """Prepara o intermediário, sem iniciá-lo.

        Argumentos:
            folder: pasta para os arquivos deste processo.
            target: porta do proxy.
            timeout: prazo de silêncio, em segundos inteiros; None deixa o do arquivo entregue.
            edits: pares (trecho do arquivo entregue, o que fica no lugar), para as provas das armadilhas.
        """
        super().__init__(folder, self.program)
        self.port = harness.free_port()
        self.file = self.folder / self.shipped
        changes = list(edits)
        if timeout is not None:
            changes.append((self.timeout_text, self.timeout_form.format(timeout)))
        text = (examples / self.shipped).read_text(encoding="utf-8")
        self.file.write_text(self.adapt(text, target, changes), encoding="utf-8")

    def adapt(self, text, target, changes):
        """Troca as portas de um arquivo entregue e, se pedido, outros trechos.

        Argumentos:
            text: o arquivo.
            target: porta do proxy.
            changes: pares (trecho, o que fica no lugar); cada trecho aparece uma vez.

        Retorno:
            O arquivo desta prova (str).
        """
        for old, new in changes:
            assert text.count(old) == 1, f"{self.shipped}: {text.count(old)} vezes {old!r}"
            text = text.replace(old, new)
        for old, new in ((front_port, self.port), (proxy_port, target)):
            assert re.search(rf"\b{old}\b", text), f"{self.shipped} sem a porta {old}"
            text = re.sub(rf"\b{old}\b", str(new), text)
        return text

    def start(self):
        """Inicia o processo e espera que ele escute.

        Retorno:
            O próprio intermediário.
        """
        self.spawn(self.command(), {**harness.base_environment(), **self.environment()})
        harness.eventually(self.listens, 20, f"{self.program} escutar")
        return self

    def listens(self):
        """Diz se já aceita conexões (bool); falha se o processo saiu."""
        assert self.alive(), f"{self.program} saiu com {self.process.returncode}:\n{self.log()}{self.output()}"
        return harness.accepts(self.port)

    def path(self):
        """Acha o executável, que no Debian pode estar fora do PATH de quem não é root.

        Retorno:
            O caminho (str).
        """
        found = shutil.which(self.program) or shutil.which(self.program, path="/usr/sbin:/sbin")
        assert found, f"não há {self.program}"
        return found

    def environment(self):
        """Variáveis de ambiente próprias deste intermediário (dict)."""
        return {}

    def command(self):
        """Linha de comando (lista) que o mantém à frente, filho deste processo."""
        raise NotImplementedError

    def stop(self):
        """Encerra o processo e os filhos que ele tenha."""
        if self.alive():
            self.process.terminate()
            self.wait()


class nginx(balancer):
    """O nginx, com o nginx.conf do Debian."""

    program = "nginx"
    shipped = "nginx.conf"
    timeout_text = "proxy_read_timeout 60s"
    timeout_form = "proxy_read_timeout {}s"

    def command(self):
        """Monta a linha de comando. Retorno: lista de str."""
        text = pathlib.Path("/etc/nginx/nginx.conf").read_text(encoding="utf-8")
        text = re.sub(r"^(user|pid|error_log|worker_processes)\b.*;", "", text, flags=re.MULTILINE)
        text = re.sub(r"^\s*(access_log|include /etc/nginx/sites-enabled).*;", "", text, flags=re.MULTILINE)
        text = text.replace("include /etc/nginx/modules-enabled/*.conf;", "")
        assert text.count("include /etc/nginx/conf.d/*.conf;") == 1
        text = text.replace("include /etc/nginx/conf.d/*.conf;", f"include {self.file}; access_log off;")
        main = self.folder / "main.conf"
        main.write_text(f"daemon off; worker_processes 1; pid {self.folder}/pid; error_log stderr;\n{text}")
        return [self.path(), "-c", str(main), "-p", str(self.folder), "-e", "stderr"]


class haproxy(balancer):
    """O HAProxy, com o haproxy.cfg do Debian."""

    program = "haproxy"
    shipped = "haproxy.cfg"
    timeout_text = "timeout server 60s"
    timeout_form = "timeout server {}s"

    def command(self):
        """Monta a linha de comando. Retorno: lista de str."""
        text = pathlib.Path("/etc/haproxy/haproxy.cfg").read_text(encoding="utf-8")
        text = re.sub(r"^\s*(log /dev/log|chroot|stats|user|group|daemon)\b.*$", "", text, flags=re.MULTILINE)
        main = self.folder / "main.cfg"
        main.write_text(text)
        return [self.path(), "-db", "-f", str(main), "-f", str(self.file)]


class apache(balancer):
    """O Apache, com o apache2.conf do Debian e o módulo que o arquivo entregue manda ligar."""

    program = "apache2"
    shipped = "apache.conf"
    timeout_text = "timeout=60"
    timeout_form = "timeout={}"

    def environment(self):
        """Variáveis que o apachectl do Debian poria (dict)."""
        names = {
            "RUN_DIR": self.folder,
            "LOG_DIR": self.folder,
            "PID_FILE": self.folder / "pid",
            "LOCK_DIR": self.folder,
        }
        account = {"RUN_USER": "www-data", "RUN_GROUP": "www-data"}
        return {f"APACHE_{name}": str(value) for name, value in (names | account).items()}

    def command(self):
        """Monta a linha de comando. Retorno: lista de str."""
        text = pathlib.Path("/etc/apache2/apache2.conf").read_text(encoding="utf-8")
        modules = "".join(
            f"Include mods-available/{name}\n" for name in ("proxy.load", "proxy.conf", "proxy_http.load")
        )
        for old, new in (
            ("Include ports.conf", modules),
            ("IncludeOptional sites-enabled/*.conf", f"Include {self.file}"),
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        main = self.folder / "main.conf"
        main.write_text("ServerName localhost\n" + text)
        return [self.path(), "-d", "/etc/apache2", "-f", str(main), "-D", "FOREGROUND"]


class caddy(balancer):
    """O Caddy, cuja configuração é o arquivo entregue."""

    program = "caddy"
    shipped = "Caddyfile"
    timeout_text = "read_timeout 60s"
    timeout_form = "read_timeout {}s"

    def environment(self):
        """Pastas próprias, e a administração num soquete delas (dict)."""
        names = ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")
        return {**dict.fromkeys(names, str(self.folder)), "CADDY_ADMIN": f"unix/{self.folder}/admin"}

    def command(self):
        """Monta a linha de comando. Retorno: lista de str."""
        return [self.path(), "run", "--adapter", "caddyfile", "--config", str(self.file)]


kinds = {"nginx": nginx, "haproxy": haproxy, "apache": apache, "caddy": caddy}
