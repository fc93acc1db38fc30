"""`migrate COMMAND` in a terminal: a shell on another host, jobs here and there."""

from moving import Desk, guests_at, until
from terminals import Terminal, terminal

FAR_SHELL = "migrate -h node2 bash --norc --noediting -i"


def far_shell(user: Terminal) -> None:
    """Type the command that makes one, and wait for its prompt."""
    user.keys(FAR_SHELL + "\n")
    user.prompt()
    user.keys("echo at $MIGRATE_HOST\n")
    user.expect("at node2\r\n")
    user.prompt()


def test_without_a_command_it_is_a_login_shell(desk: Desk) -> None:
    with terminal(desk) as user:
        name = user.run("tty")
        user.keys("SHELL=/bin/sh migrate -h node2\n")
        user.expect(r"\$ ")
        user.keys("echo is $0 at $MIGRATE_HOST; tty; stty size; pwd; exit 3\n")
        user.expect("is -sh at node2\r\n")
        user.expect(name.strip() + "\r\n")
        user.expect("24 80\r\n")
        user.expect(desk.directory + "\r\n")
        user.prompt()
        assert user.run("echo $?") == "3\n"


def test_jobs_of_a_far_shell_are_its_own(desk: Desk) -> None:
    with terminal(desk) as user:
        far_shell(user)
        user.keys("cat\n")
        user.keys("one\n")
        user.expect("one\r\none\r\n")
        user.press("^Z")
        user.expect(r"\[1\]\+  Stopped +cat\r\n")
        user.prompt()
        user.keys("fg\n")
        user.expect("cat\r\n")
        user.keys("two\n")
        user.expect("two\r\ntwo\r\n")
        user.press("^C")
        user.prompt()
        assert user.run("echo $? $MIGRATE_HOST") == "130 node2\n"
        user.press("^D")
        user.expect("exit\r\n")
        user.prompt()
        assert user.run("echo $? $MIGRATE_HOST") == "0\n"


def test_a_job_of_the_shell_at_home(desk: Desk) -> None:
    with terminal(desk) as user:
        user.keys("migrate -h node2 sh -c 'echo up; cat; echo down'\n")
        user.expect("up\r\n")
        user.keys("one\n")
        user.expect("one\r\none\r\n")
        user.press("^Z")
        user.expect(r"\[1\]\+  Stopped")
        user.prompt()
        assert user.run("echo here") == "here\n"
        user.keys("bg\n")
        user.prompt()
        user.keys("\n")
        user.prompt()
        until(lambda: "Stopped" in user.run("jobs"), "it stopped when it read")
        user.keys("fg\n")
        user.expect("down'\r\n")
        user.keys("two\n")
        user.expect("two\r\ntwo\r\n")
        user.press("^D")
        user.expect("down\r\n")
        user.prompt()
        user.keys("migrate -h node2 sleep 100\n")
        until(lambda: guests_at(desk.nodes, "node2"), "it runs")
        user.press("^C")
        user.prompt()
        assert user.run("echo $?") == "130\n"


def test_a_far_shell_and_its_job_move_on(desk: Desk) -> None:
    with terminal(desk) as user:
        far_shell(user)
        pid = int(user.run("echo $$"))
        user.keys("cat\n")
        user.expect("cat\r\n")
        for host in ("node3", "node1", "node2"):
            desk.move(pid, host)
            user.keys(f"to {host}\n")
            user.expect(f"to {host}\r\nto {host}\r\n")
        user.press("^C")
        user.prompt()
        assert user.run("echo $?") == "130\n"
        user.keys("exit\n")
        user.expect("exit\r\n")
        user.prompt()


def test_an_editor(desk: Desk) -> None:
    with terminal(desk) as user:
        user.keys("migrate -h node2 vi text\n")
        user.expect("text")
        user.keys("ione\n")
        user.expect("one")
        user.press("Esc")
        user.keys(":wq\n")
        user.prompt()
        assert desk.read("text") == "one\n\n"


def test_a_screen_that_changes(desk: Desk) -> None:
    with terminal(desk) as user:
        user.keys("migrate -h node2 top -d 0.5\n")
        user.expect("load average")
        user.expect("load average")
        user.keys("q")
        user.prompt()
        assert user.run("echo $?") == "0\n"


def test_a_terminal_changes_its_size_at_both_ends(desk: Desk) -> None:
    with terminal(desk) as user:
        name = user.run("tty").strip()
        far_shell(user)
        assert user.run("stty size") == "24 80\n"
        user.run("trap 'echo at $(stty size)' WINCH")
        desk.nodes.sh(desk.home, f"stty -F {name} rows 40 cols 100")
        user.keys("\n")
        user.expect("at 40 100\r\n")


def test_keys_from_the_terminal_while_stdin_is_a_pipe(desk: Desk) -> None:
    with terminal(desk) as user:
        user.keys("seq 200 | migrate -h node2 less\n")
        user.expect("\r\n23\r\n")
        user.keys("G")
        user.expect("\r\n200\r\n")
        user.keys("q")
        user.prompt()
        user.keys("migrate -h node2 seq 200 | less\n")
        user.expect("\r\n23\r\n")
        user.keys("Gq")
        user.expect("\r\n200\r\n")
        user.prompt()


def test_a_closed_terminal_ends_it(desk: Desk) -> None:
    with terminal(desk) as user:
        far_shell(user)
        user.keys("sleep 100\n")
        user.expect("sleep 100\r\n")
    until(lambda: not guests_at(desk.nodes, "node2"), "it is gone")


def test_what_cannot_be_run_leaves_the_terminal_as_it_was(desk: Desk) -> None:
    with terminal(desk) as user:
        mode = user.run("stty -g")
        assert user.run("migrate -h node2 nonesuch; echo $?") == (
            "migrate: nonesuch: command not found\n127\n"
        )
        assert user.run("stty -g") == mode


def test_a_cut_during_a_far_shell_is_told_and_waited_for(desk: Desk) -> None:
    with terminal(desk) as user:
        far_shell(user)
        user.keys("cat\n")
        user.expect("cat\r\n")
        desk.nodes.cut("node2")
        user.expect("migrate: host node2: cut off; waiting for it\r\n")
        desk.nodes.heal("node2")
        user.keys("back\n")
        user.expect("back\r\nback\r\n", 60)
        user.press("^D")
        user.prompt()
        user.keys("exit\n")
        user.expect("exit\r\n")
        user.prompt()
