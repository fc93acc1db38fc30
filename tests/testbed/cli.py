"""The command line of the testbed, tests/testbed/nodes."""

import argparse
import os
import signal
import sys

from testbed.errors import TestbedError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nodes", description="Hosts to try migrate on.")
    words = parser.add_subparsers(dest="word", required=True, metavar="COMMAND")
    up = words.add_parser("up", help="start the nodes, with the product of this checkout")
    up.add_argument("--count", type=int, help="how many (3)")
    usage = "nodes exec NODE [--user USER] [--tty] -- COMMAND…"
    execute = words.add_parser("exec", help="run a command in a node", usage=usage)
    execute.add_argument("node")
    execute.add_argument("--user", default="root", help="root, alice or bob")
    execute.add_argument("--tty", action="store_true", help="in a terminal of the node's")
    words.add_parser("ps", help="show the nodes")
    for word, text in (
        ("logs", "show migd's log"),
        ("cut", "let the node's packets get lost"),
        ("heal", "undo cut"),
        ("kill", "switch the node off, at once"),
        ("boot", "switch it on again"),
    ):
        words.add_parser(word, help=text).add_argument("node")
    words.add_parser("down", help="stop and remove all of it")
    return parser


def _execute(given: argparse.Namespace, command: list[str]) -> int:
    from testbed.entry import execute
    from testbed.lifecycle import Testbed

    if not command:
        raise TestbedError("no command is given", "nodes exec NODE -- COMMAND…")
    return execute(Testbed().node(given.node), command, given.user, given.tty)


def _show() -> None:
    from testbed.lifecycle import Testbed
    from testbed.network import Switch

    testbed = Testbed()
    nodes = testbed.nodes()
    links = Switch(testbed.instance).links() if nodes else {}
    for node in nodes:
        if node.init_pid is None:
            print(f"{node.name}  {node.address}  off")
            continue
        network = "connected" if links.get(node.name) else "cut"
        services = ", ".join(node.service_states())
        print(f"{node.name}  {node.address}  on, {network}  pid {node.init_pid}  {services}")


def _run(given: argparse.Namespace, command: list[str]) -> int:
    if os.geteuid() != 0:
        raise TestbedError("nodes are made of namespaces", "run this as root")
    if given.word == "exec":
        return _execute(given, command)
    from testbed.lifecycle import Testbed
    from testbed.network import Switch

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it is undone as with ^C
    testbed = Testbed()
    if given.word == "up":
        testbed.up(given.count)
        _show()
    elif given.word == "ps":
        _show()
    elif given.word == "logs":
        sys.stdout.write(testbed.node(given.node).service_log("migd"))
    elif given.word == "cut":
        Switch(testbed.instance).cut(testbed.node(given.node).name)
    elif given.word == "heal":
        Switch(testbed.instance).heal(testbed.node(given.node).name)
    elif given.word == "kill":
        testbed.kill(given.node)
    elif given.word == "boot":
        testbed.boot(given.node)
    elif given.word == "down":
        testbed.down()
    return 0


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """What is before the first "--", and what is behind it."""
    border = words.index("--") if "--" in words else len(words)
    return words[:border], words[border + 1 :]


def main() -> None:
    """Do what argv says and exit."""
    own, command = _split(sys.argv[1:])
    given = _parser().parse_args(own)
    try:
        status = _run(given, command)
    except TestbedError as error:
        print(f"nodes: {error}", file=sys.stderr)
        status = 125
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    os._exit(status)
