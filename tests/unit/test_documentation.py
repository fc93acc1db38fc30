"""The man page and the completions know the options that `migrate` has, and no others."""

import re
import subprocess
from pathlib import Path

import pytest
import typer

from migrate.cli import app

TOP = Path(__file__).parents[2]
COMPLETIONS = {
    "bash/migrate": r"(?<=[ '])--?[a-zA-Z]+(?=[ '])",
    "zsh/_migrate": r"(?<=')(?:\*|\(-[hH]\))?(--?[a-zA-Z]+)(?=\[)",
    "fish/migrate.fish": r"-(?:s (\w)|l (\w+))",
}
CONFIG = """\
[[host]]
name = "node1"
address = "node1"
id = 1

[[host]]
name = 'other2'
id = 12

[settings]
name = "node1"
"""


def options() -> dict[str, str]:
    """Each option and the name of its value, as --help shows them."""
    command = typer.main.get_command(app)
    found = {"--help": ""}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            found.update(dict.fromkeys(parameter.opts, parameter.metavar or ""))
    return found


def test_the_man_page_has_every_option_with_its_value() -> None:
    text = (TOP / "docs/migrate.1").read_text().replace("\\-", "-")
    section = text.partition(".SH OPTIONS\n")[2].partition(".SH ")[0]
    heads = re.findall(r'^\.TP\n\.BI? (-\S+)(?: " (\w+)")?$', section, re.M)
    assert dict(heads) == options()


@pytest.mark.parametrize("file", COMPLETIONS)
def test_each_completion_knows_every_option(file: str) -> None:
    known = set()
    for line in (TOP / "completion" / file).read_text().splitlines():
        if re.search(r"words='-|^ +'.*\[|^complete \$options", line):
            for found in re.finditer(COMPLETIONS[file], line):
                word = next((group for group in found.groups() if group), found[0])
                known.add(word if word.startswith("-") else f"-{'-' * (len(word) > 1)}{word}")
    assert known == set(options())


WORDS = {
    "migrate -h n": ["node1"],
    "migrate -vh o": ["other2"],
    "migrate -H ": ["1", "12"],
    "migrate -h node1 -": [
        "-p",
        "-h",
        "-H",
        "-v",
        "-D",
        "-b",
        "-B",
        "-l",
        "-E",
        "--check",
        "--help",
    ],
    "migrate -h node1 ls -": [],
    "migrate -h node1 base64": ["base64"],
}


@pytest.mark.parametrize("line", WORDS)
def test_bash_completes(line: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)
    words = line.split(" ")
    script = (
        '. "$1"; _migrate_config=$2; shift 2; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        '_migrate; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "-c", script, "bash", str(TOP / "completion/bash/migrate"), str(config)]
    told = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    assert sorted(set(told.stdout.split())) == sorted(WORDS[line])
    assert told.stderr == ""
