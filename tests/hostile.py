"""Programs that attack a sandbox. They print `done` where the harm has worked and `refused` where it has not.

Each is Python code, run with arguments. Outside of the sandbox each is harmless, because it stops at a number, or
because it works on files and processes that its caller names. Programs that have no such bound say so.
"""

from __future__ import annotations

MODULES = ["ctypes", "json", "os", "re", "resource", "signal", "socket", "subprocess", "sys", "threading", "time"]
ATTEMPT = """
def attempt(name, action):
    try:
        result = action()
    except BaseException as error:
        print(name, "refused", type(error).__name__, error)
    else:
        print(name, "done", "" if result is None else result)
"""
CALL = """
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


def source(program: str) -> str:
    """A program with the functions that it calls and the modules that it uses."""
    text = ATTEMPT + (CALL if "call(" in program else "") + program
    return "\n".join(f"import {name}" for name in MODULES if f"{name}." in text) + text


# --- resources ---

# Argument: the number of processes at which it stops. They sleep for one second.
FORKS = """
made = 0
for made in range(int(sys.argv[1]) + 1):
    try:
        if made == int(sys.argv[1]):
            break
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
    except OSError:
        break
print(made)
sys.stdout.flush()
"""
THREADS = """
made = 0
for made in range(int(sys.argv[1]) + 1):
    try:
        if made == int(sys.argv[1]):
            break
        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
    except RuntimeError:
        break
print(made)
sys.stdout.flush()
os._exit(0)
"""
# Only for the sandbox: without a bound. Argument: a word by which the processes can be found.
FORK_BOMB = """
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
# Argument: bytes in one process.
MEMORY = """
blocks = []
def fill():
    for _ in range(int(sys.argv[1]) // 2**22):
        blocks.append(bytearray(b"x") * 2**22)
attempt("memory", fill)
time.sleep(0.5)
"""
# Arguments: processes, and bytes in each.
MEMORY_OF_MANY = """
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        block = bytearray(b"x") * int(sys.argv[2])
        time.sleep(0.5)
        os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
print("memory done")
"""
# Argument: bytes of a mapping that processes could share.
SHARED_MEMORY = """
import mmap
block = mmap.mmap(-1, int(sys.argv[1]))
for position in range(0, len(block), 4096):
    block[position] = 1
time.sleep(0.5)
print("memory done")
"""
# Arguments: 1 for stdout or 2 for stderr, and bytes.
OUTPUT = """
left = int(sys.argv[2])
while left > 0:
    left -= os.write(int(sys.argv[1]), b"x" * min(left, 65536))
"""
# Arguments: a folder, bytes of a file, and a number of files.
FILES = """
def fill():
    for number in range(int(sys.argv[3])):
        with open(os.path.join(sys.argv[1], f"filled{number}"), "wb", buffering=0) as file:
            left = int(sys.argv[2])
            while left > 0:
                left -= file.write(b"x" * min(left, 2**20))
attempt("files", fill)
"""
RESERVED_FILE = """
def reserve():
    with open("reserved", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, int(sys.argv[1]))
def hole():
    with open("hole", "wb") as file:
        file.truncate(int(sys.argv[1]))
attempt("reserve", reserve)
attempt("hole", hole)
"""
MANY_FILES = """
for number in range(int(sys.argv[1])):
    open(f"small{number}", "w").close()
time.sleep(0.5)
print("files done")
"""
SLEEP = "print('began', flush=True); time.sleep(1000)"
SILENT = "import time; time.sleep(1000)"
BUSY = """
for _ in range(4):
    threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()
"""
STUBBORN = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGALRM):
    signal.signal(number, signal.SIG_IGN)
print("began", flush=True)
while True:
    pass
"""
CLOSED_OUTPUT = """
for descriptor in (0, 1, 2):
    os.close(descriptor)
time.sleep(float(sys.argv[1]))
os._exit(7)
"""

# --- processes ---

# Arguments: a word by which the child can be found, and how the child leaves its parent.
SURVIVOR = """
child = [sys.executable, "-c", "import time; time.sleep(20)", sys.argv[1]]
if sys.argv[2] == "session":
    subprocess.Popen(child, start_new_session=True)
elif sys.argv[2] == "group":
    subprocess.Popen(child, process_group=0)
elif os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        os.execv(child[0], child)
    os._exit(0)
else:
    os.wait()
print("done", flush=True)
"""
# Argument: the number of a process of the host.
KILL = """
attempt("kill", lambda: os.kill(int(sys.argv[1]), signal.SIGKILL))
"""
KILL_FIRST = """
attempt("first", lambda: os.kill(1, signal.SIGKILL))
time.sleep(0.2)
print("alive")
"""
KILL_ALL = "os.kill(-1, signal.SIGKILL); print('alive')"

# --- files and secrets of the host ---

# Arguments: paths.
READ = """
for path in sys.argv[1:]:
    attempt("read", lambda: open(path).read(100))
"""
DELETE = """
for path in sys.argv[1:]:
    attempt("delete", lambda: os.remove(path))
    attempt("write", lambda: open(path, "w").close())
"""
# Only for the sandbox: deletes what it can, in 500 attempts for each folder of the root.
DELETE_ALL = """
deleted = 0
tried = {}
tops = [f"/{name}" for name in os.listdir("/") if name not in ("proc", "tmp", "dev")]
for parent, folders, files in (found for top in tops for found in os.walk(top)):
    for name in files + folders:
        path = os.path.join(parent, name)
        top = path.split("/")[1]
        tried[top] = tried.get(top, 0) + 1
        if tried[top] > 500:
            break
        try:
            os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
        except OSError:
            continue
        deleted += 1
print("deleted", deleted, sorted(tried))
"""
# Argument: a word that the caller's environment holds.
ENVIRONMENT = """
found = [os.environ.get("OPENAI_API_KEY", "")]
for number in filter(str.isdigit, os.listdir("/proc")):
    try:
        found.append(open(f"/proc/{number}/environ").read())
    except OSError:
        pass
print("done" if any(sys.argv[1] in one for one in found) else "refused")
"""
# Argument: a file of the host.
PROC = """
attempt("root-of-the-first-process", lambda: open("/proc/1/root" + sys.argv[1]).read())
attempt("folder-of-the-first-process", lambda: open("/proc/1/cwd" + sys.argv[1]).read())
attempt("sysrq", lambda: open("/proc/sysrq-trigger", "w").close())
attempt("sysctl", lambda: open("/proc/sys/vm/overcommit_memory", "w").close())
attempt("core-pattern", lambda: open("/proc/sys/kernel/core_pattern", "w").close())
attempt("kernel-messages", lambda: os.close(os.open("/proc/kmsg", os.O_RDONLY | os.O_NONBLOCK)))
attempt("interpreter", lambda: open(os.__file__, "r+b").close())
attempt("program", lambda: open(os.path.realpath("/bin/sh"), "r+b").close())
"""
STATUS = """
status = open("/proc/self/status").read() + open("/proc/1/status").read()
print(re.findall(r"(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp):\\s*(\\w+)", status))
print([name for name in os.listdir("/proc/self/fd") if int(name) > 3])
print([line for line in open("/proc/mounts") if not {"nosuid", "nodev"} <= set(line.split()[3].split(","))])
"""

# --- network ---

# Arguments: a port with a TCP and a UDP server, the path of a socket, and the name of an abstract socket.
NETWORK = """
port, path, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", port), 1).close())
attempt("unix", lambda: socket.socket(socket.AF_UNIX).connect(path))
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0" + name))
def query():
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(0.5)
    client.sendto(b"query", ("127.0.0.1", port))
    return client.recv(10)
attempt("udp", query)
"""
OUTSIDE = """
attempt("address", lambda: socket.create_connection(("192.0.2.1", 80), 1))
attempt("name", lambda: socket.getaddrinfo("example.org", 80))
print(socket.if_nameindex() if hasattr(socket, "if_nameindex") else "")
"""
# Families that are not bound to a network namespace, or have a large kernel interface.
FAMILIES = """
for name, family in {"netlink": 16, "packet": 17, "alg": 38, "vsock": 40}.items():
    attempt(name, lambda: socket.socket(family, socket.SOCK_RAW if name in ("netlink", "packet") else
        socket.SOCK_STREAM if name == "vsock" else socket.SOCK_SEQPACKET))
"""

# --- the kernel ---

# Argument: a JSON object of names and numbers of system calls. Their arguments are all 0 or invalid.
CALLS = """
for name, number in json.loads(sys.argv[1]).items():
    attempt(name, lambda: call(number, -1, 0, 0, 0, 0, 0))
"""
# Argument: the number of `clone`. Each child ends at once.
CLONE = """
flags = dict(user=0x10000000, mount=0x20000, pid=0x20000000, net=0x40000000, ipc=0x08000000, uts=0x04000000,
    cgroup=0x02000000)
def child(flag):
    if call(int(sys.argv[1]), flag | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)
for name, flag in flags.items():
    attempt(name, lambda: child(flag))
attempt("none", lambda: child(0))
"""
X32 = "call(0x40000000 + 39); print('done')"
SETUID = """
import shutil
shutil.copy("/usr/bin/id", "id")
attempt("mode", lambda: os.chmod("id", 0o6755))
print(subprocess.run(["./id", "-u"], capture_output=True, text=True).stdout.strip() == str(os.getuid()))
print(os.getuid() != 0, subprocess.run(["su", "-c", "id -u"], stdin=subprocess.DEVNULL, capture_output=True).returncode)
"""

# --- programs that must work ---

CORRECT = {
    "input_to_output": "print(sum(map(int, sys.stdin.read().split())))",
    "threads_and_processes": """
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pool
def square(number):
    return number * number
if __name__ == "__main__":
    with ThreadPoolExecutor(4) as threads, Pool(3) as pool:
        assert list(threads.map(square, range(9))) == pool.map(square, range(9))
    assert subprocess.run(["sh", "-c", "echo 3 | tr 3 4"], capture_output=True, text=True).stdout == "4\\n"
    print(6)
""",
    "standard_library": """
import collections, decimal, fractions, functools, heapq, itertools, math, random, sqlite3, tempfile, zoneinfo
heap = [3, 1, 2]
heapq.heapify(heap)
assert heapq.heappop(heap) == 1 and decimal.Decimal("0.1") + decimal.Decimal("0.2") == decimal.Decimal("0.3")
assert re.findall(r"\\d+", "a1b22") == ["1", "22"] and json.loads(json.dumps({"a": [1]})) == {"a": [1]}
assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
with tempfile.TemporaryFile() as file:
    file.write(b"x")
print(6)
""",
    "deep_recursion": """
sys.setrecursionlimit(10**6)
threading.stack_size(512 * 2**20)
def depth(number):
    return 0 if number == 0 else 1 + depth(number - 1)
def main():
    assert depth(50_000) == 50_000
    print(6)
thread = threading.Thread(target=main)
thread.start()
thread.join()
""",
    "files": """
os.makedirs("a/b")
with open("a/b/c.txt", "w") as file:
    file.write("6")
print(open("/tmp/a/b/c.txt").read())
""",
    "local_sockets": """
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
server.accept()[0].sendall(b"6")
print(client.recv(1).decode())
""",
    "shared_pages": """
block = bytearray(b"x") * (60 * 2**20)
for _ in range(6):
    if os.fork() == 0:
        time.sleep(0.3)
        os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
print(6)
""",
}
