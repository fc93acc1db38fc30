"""What alice runs in these tests: small programs that show it if anything about a move is wrong."""

COUNTER = """\
'''Counts on stdout, with its ids, every 2 ms until the file `enough` is here; ends with argv[1].'''
import os, signal, sys, time

def say(text):
    os.write(1, text.encode() + b"\\n")

signal.signal(signal.SIGUSR1, lambda number, frame: say(f"signal {number}"))
signal.signal(signal.SIGUSR2, lambda number, frame: say(f"signal {number}"))
number = 0
while not os.path.exists("enough"):
    number += 1
    say(f"{number} {os.getpid()} {os.getppid()} {os.getpgrp()} {os.getsid(0)}")
    time.sleep(0.002)
say("enough")
sys.exit(int(sys.argv[1]))
"""

COPIER = """\
'''Copies stdin to stdout line by line, as slowly as a program that thinks about each.'''
import sys, time

for number, line in enumerate(sys.stdin):
    sys.stdout.write(line)
    sys.stdout.flush()
    if number % 50 == 0:
        time.sleep(0.001)
"""

LOGGER = """\
'''Appends "argv[1] NUMBER" to the file `log`, every 2 ms until the file `enough` is here.

Lines are 16 bytes long, so none lies across two pages: FUSE may write such a one in two steps.
'''
import os, sys, time

log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
number = 0
while not os.path.exists("enough"):
    number += 1
    os.write(log, f"{sys.argv[1]} {number}".ljust(15).encode() + b"\\n")
    time.sleep(0.002)
"""

REPORTER = """\
'''Answers each file `ask.N` with a file `answer.N`: its surroundings, as it sees them then.'''
import json, os, time

opened = open("opened", "r+")
opened.seek(5)
number = 0
os.umask(0o027)
print("ready", flush=True)
while True:
    number += 1
    while not os.path.exists(f"ask.{number}"):
        if os.path.exists("enough"):
            raise SystemExit(0)
        time.sleep(0.002)
    umask = os.umask(0)
    os.umask(umask)
    answer = {
        "asked": open(f"ask.{number}").read(),
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "umask": umask,
        "position": opened.tell(),
        "ids": [os.getuid(), os.getgid(), *os.getgroups()],
        "host name": os.uname().nodename,
        "descriptors": sorted(set(os.listdir("/proc/self/fd")))[:4],
        "argv": open("/proc/self/cmdline").read(),
    }
    with open(f"answer.{number}.new", "w") as file:
        json.dump(answer, file)
    os.rename(f"answer.{number}.new", f"answer.{number}")
"""

TREE = """\
'''Three processes with two threads each. They share memory that has no name, and talk through pipes.

Every thread counts in the shared memory; the parent sends each child a number and gets it back, plus
one, and prints "round SUM". It ends with 7 when the file `enough` is here, having seen every child
end with 0, and "alive" for each of the threads that still counted.
'''
import mmap, os, struct, sys, threading, time

CELL = struct.Struct("=Q")
SLOTS = 6
shared = mmap.mmap(-1, 4096)

def read(slot):
    return CELL.unpack_from(shared, slot * CELL.size)[0]

def count(slot):
    while True:
        CELL.pack_into(shared, slot * CELL.size, read(slot) + 1)
        time.sleep(0.002)

def two_threads(first):
    for slot in (first, first + 1):
        threading.Thread(target=count, args=(slot,), daemon=True).start()

children = []
for child in range(2):
    question, asking = os.pipe()
    answering, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(asking)
        os.close(answering)
        for _, other_asking, other_answering in children:
            os.close(other_asking)
            os.close(other_answering)
        two_threads(2 + 2 * child)
        while data := os.read(question, CELL.size):
            os.write(answer, CELL.pack(CELL.unpack(data)[0] + 1))
        os._exit(0)
    os.close(question)
    os.close(answer)
    children.append((pid, asking, answering))
two_threads(0)
value = 0
print("children", *(pid for pid, _, _ in children), flush=True)
while not os.path.exists("enough"):
    for _, asking, answering in children:
        os.write(asking, CELL.pack(value))
        value = CELL.unpack(os.read(answering, CELL.size))[0]
    print("round", value, flush=True)
    time.sleep(0.002)
before = [read(slot) for slot in range(SLOTS)]
deadline = time.monotonic() + 10
while time.monotonic() < deadline and any(read(s) == before[s] for s in range(SLOTS)):
    time.sleep(0.01)
print("alive", sum(read(slot) > before[slot] for slot in range(SLOTS)), flush=True)
for pid, asking, _ in children:
    os.close(asking)
    if os.waitpid(pid, 0) != (pid, 0):
        sys.exit(3)
sys.exit(7)
"""

LOCKER = """\
'''Holds a flock on the file `locked`; with an argument, listens on a TCP port too.'''
import fcntl, socket, sys, time

file = open("locked", "w")
fcntl.flock(file, fcntl.LOCK_EX)
if len(sys.argv) > 1:
    server = socket.create_server(("127.0.0.1", 0))
print("ready", flush=True)
time.sleep(600)
"""

LISTENER = """\
'''Listens on a TCP port.'''
import socket, time

server = socket.create_server(("127.0.0.1", 0))
print("ready", flush=True)
time.sleep(600)
"""

ZOMBIE = """\
'''Has a child that has ended and is never waited for, and prints its pid.'''
import os, time

pid = os.fork()
if pid == 0:
    os._exit(0)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
print("zombie", pid, flush=True)
time.sleep(600)
"""

SLEEPER = """\
'''Does nothing, and has nothing.'''
import time

print("ready", flush=True)
time.sleep(600)
"""

PAIR = """\
'''Two children talk to each other through a socket; the parent only waits for them, and ends with 7 if both
have exchanged words until the file `enough` was here.'''
import os, socket, sys, time

def talk(end, first):
    count = 0
    if first:
        end.send(b"word")
    while end.recv(4):
        count += 1
        time.sleep(0.002)
        if os.path.exists("enough"):
            break
        end.send(b"word")
    end.close()
    os._exit(0 if count > 2 else 1)

ends = socket.socketpair()
children = []
for number in (0, 1):
    pid = os.fork()
    if pid == 0:
        ends[1 - number].close()
        talk(ends[number], number == 0)
    children.append(pid)
for end in ends:
    end.close()
print("children", *children, flush=True)
for pid in children:
    if os.waitpid(pid, 0) != (pid, 0):
        sys.exit(3)
sys.exit(7)
"""

PROGRAMS = {
    "counter.py": COUNTER,
    "copier.py": COPIER,
    "logger.py": LOGGER,
    "reporter.py": REPORTER,
    "tree.py": TREE,
    "locker.py": LOCKER,
    "listener.py": LISTENER,
    "zombie.py": ZOMBIE,
    "sleeper.py": SLEEPER,
    "pair.py": PAIR,
}
