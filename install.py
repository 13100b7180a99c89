"""python install.py: the versions of requirements.lock, and muonlab, into the environment whose Python runs this.

uv installs them, the user's own or one that pip brings into the environment, in a fraction of pip's time. It does not
read pip's settings, so it is given them: where pip takes torch from a folder or another index, uv takes the same. Pip
itself installs them where there is no uv, where uv fails, or where pip has a setting that uv lacks.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

UV = "uv>=0.8,<1"
LOCKED = ["-r", "requirements.lock"]
MUONLAB = ["--no-deps", "--no-build-isolation", "-e", "."]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

# Pip's settings as uv's options, as variables of its environment, and those that change nothing of what is installed.
OPTIONS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
IDLE = {
    *(
        "cache-dir",
        "no-cache-dir",
        "disable-pip-version-check",
        "retries",
        "require-virtualenv",
        "prefer-binary",
    ),
    *(
        "no-color",
        "no-input",
        "progress-bar",
        "quiet",
        "verbose",
        "root-user-action",
        "no-warn-script-location",
    ),
}


def main() -> int:
    """Install by uv, or else by pip; the exit code is the installer's."""
    reason = install_by_uv()
    if reason is None:
        return 0
    print(f"pip installs the packages, which takes minutes: {reason}", file=sys.stderr, flush=True)
    return install([*PIP, "install", "--quiet"], {}, capture=False).returncode


def install_by_uv() -> str | None:
    """Install by uv; why it was not done, or None."""
    settings = pip_settings()
    if unknown := sorted(settings.keys() - OPTIONS.keys() - VARIABLES.keys() - IDLE - {"no-index"}):
        return f"uv has no counterpart of its setting {unknown[0]}"
    uv = find_uv()
    if uv is None:
        return "it found no uv"
    options, variables = translated(settings)
    command = [uv, "pip", "install", "--quiet", "--python", sys.executable, *options]
    done = install(command, variables, capture=True)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"uv failed ({lines[0] if lines else 'it gave no reason'})" if done.returncode else None


def find_uv() -> str | None:
    """The user's uv, or one that pip installs into the environment."""
    if own := shutil.which("uv"):
        return own
    subprocess.run([*PIP, "install", "--quiet", UV], capture_output=True, check=False)
    return shutil.which("uv", path=str(Path(sys.executable).parent))


def pip_settings() -> dict[str, str]:
    """What pip's files and environment tell `pip install`, by option; the environment counts most."""
    done = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True)
    sections: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.partition(".")
        sections.setdefault(section, {})[option] = ast.literal_eval(value)
    return {k: v for name in ("global", "install", ":env:") for k, v in sections.get(name, {}).items()}


def translated(settings: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """uv's options and environment for these settings of pip."""
    # Pip compares the versions of all indexes; uv would stop at the first index that has the package.
    options = ["--index-strategy", "unsafe-best-match"]
    for name, option in OPTIONS.items():
        for value in settings.get(name, "").split():
            options += [option, value]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    return options, {VARIABLES[name]: value for name, value in settings.items() if name in VARIABLES}


def install(
    command: list[str], variables: dict[str, str], capture: bool
) -> "subprocess.CompletedProcess[str]":
    """Run an installer for the locked packages and then, with the build backend there, for muonlab."""
    for what in (LOCKED, MUONLAB):
        done = subprocess.run(
            [*command, *what],
            env={**os.environ, **variables},
            stderr=subprocess.PIPE if capture else None,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
        if done.returncode:
            break
    return done


if __name__ == "__main__":
    sys.exit(main())
