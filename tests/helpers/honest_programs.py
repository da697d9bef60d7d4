"""Programs that a sandbox must run, with their standard input and output."""

from __future__ import annotations

HONEST: dict[str, tuple[str, str, str]] = {
    "devnull": ("import os\nopen(os.devnull, 'w').write('x')\nprint(1)", "", "1\n"),
    "zero and full": (
        "print(open('/dev/zero', 'rb').read(2))\n"
        "try:\n    with open('/dev/full', 'w') as f: f.write('x')\n"
        "except OSError as e: print(e.strerror)",
        "",
        "b'\\x00\\x00'\nNo space left on device\n",
    ),
    "random bytes": (
        "import os, secrets\nprint(len(open('/dev/urandom', 'rb').read(9)), "
        "len(os.urandom(9)), len(secrets.token_hex(4)))",
        "",
        "9 9 8\n",
    ),
    "temporary files": (
        "import tempfile\nwith tempfile.TemporaryDirectory() as d, "
        "tempfile.NamedTemporaryFile(dir=d) as f, tempfile.TemporaryFile() as g:\n"
        "    f.write(b'ab'); f.flush(); g.write(b'c')\n    print(open(f.name).read())",
        "",
        "ab\n",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "print(sum(ThreadPoolExecutor(6).map(lambda x: x * x, range(9))))",
        "",
        "204\n",
    ),
    "processes": (
        "import multiprocessing\ndef f(x): return x * x\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('fork').Pool(3) as p: print(p.map(f, range(4)))",
        "",
        "[0, 1, 4, 9]\n",
    ),
    "futures of processes": (
        "from concurrent.futures import ProcessPoolExecutor\ndef f(x): return x + 1\n"
        "with ProcessPoolExecutor(2) as p: print(list(p.map(f, range(3))))",
        "",
        "[1, 2, 3]\n",
    ),
    "a pool of eight": (
        "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "def f(x): return -x\nwith multiprocessing.Pool(8) as p: print(p.map(f, range(9)))\n"
        "with ProcessPoolExecutor(8) as p: print(list(p.map(f, range(9))))",
        "",
        "[0, -1, -2, -3, -4, -5, -6, -7, -8]\n" * 2,
    ),
    "a queue of processes": (
        "import multiprocessing as m\nq = m.Queue()\n"
        "p = m.Process(target=q.put, args=(7,)); p.start(); print(q.get()); p.join()",
        "",
        "7\n",
    ),
    "a python of its own": (
        "import subprocess, sys\n"
        "p = subprocess.run([sys.executable, '-c', 'print(input() * 2)'], input='ab', text=True, "
        "capture_output=True)\nprint(p.returncode, p.stdout + p.stderr, end='')",
        "",
        "0 abab\n",
    ),
    "a command of the shell": (
        'import subprocess\nprint(subprocess.check_output(\'echo b a | tr " " "\\n" | sort\', '
        "shell=True, text=True).split())",
        "",
        "['a', 'b']\n",
    ),
    "spawned processes": (
        "import multiprocessing as m\nif __name__ == '__main__':\n"
        "    with m.get_context('spawn').Pool(2) as p: print(p.map(abs, [-1, 2]))",
        "",
        "[1, 2]\n",
    ),
    "shared memory": (
        "from multiprocessing.shared_memory import SharedMemory\n"
        "a = SharedMemory(create=True, size=64); b = SharedMemory(a.name)\n"
        "a.buf[0] = 7; print(b.buf[0]); b.close(); a.close(); a.unlink()",
        "",
        "7\n",
    ),
    "a flushed map": (
        "import mmap\nf = open('m', 'w+b'); f.truncate(4096)\n"
        "m = mmap.mmap(f.fileno(), 4096); m[:2] = b'ab'; m.flush(); m.close()\n"
        "f.seek(0); print(f.read(2))\nprint(len(mmap.mmap(-1, 8192)))",
        "",
        "b'ab'\n8192\n",
    ),
    "standard input": (
        "import sys\nn = int(input())\nprint(n, sys.stdin.read().split())",
        "3\na b\nc\n",
        "3 ['a', 'b', 'c']\n",
    ),
    "lines of standard input": (
        "import sys\nprint([l.strip() for l in sys.stdin], sys.stdin.readline() == '')",
        "a\nb",
        "['a', 'b'] True\n",
    ),
    "bytes of standard input": (
        "import sys, os\nprint(sys.stdin.buffer.read(2), os.read(0, 9))",
        "abc",
        "b'ab' b''\n",
    ),
    "the device of standard input": ("print(open(0).read())", "abc", "abc\n"),
    "the name of standard input": ("print(open('/dev/stdin').read())", "abc", "abc\n"),
    "the name of standard output": ("open('/dev/stdout', 'w').write('x\\n')", "", "x\n"),
    "the name of a descriptor": ("print(open('/dev/fd/0').read())", "abc", "abc\n"),
    "much output": ("import sys\nsys.stdout.write('x' * 1_000_000)", "", "x" * 1_000_000),
    "output of bytes": (
        "import sys\nsys.stdout.buffer.write(b'a'); sys.stdout.flush(); print('b', end='')",
        "",
        "ab",
    ),
    "unicode": (
        "print('\\u00e9\\u4e2d\\U0001f600', input())",
        "\u00e9",
        "\u00e9\u4e2d\U0001f600 \u00e9\n",
    ),
    "locale": (
        "import locale\nlocale.setlocale(locale.LC_ALL, '')\n"
        "print(locale.getpreferredencoding().lower().replace('-', ''), '\\u00e9'.upper())",
        "",
        "utf8 \u00c9\n",
    ),
    "large integers": (
        "import sys, math\nsys.set_int_max_str_digits(0)\n"
        "print(len(str(7 ** 20000)), math.factorial(30))",
        "",
        "16902 265252859812191058636308480000000\n",
    ),
    "floats": (
        "print(0.1 + 0.2, f'{1e22:.3e}', '%.10f' % (1 / 3), float('inf'))",
        "",
        "0.30000000000000004 1.000e+22 0.3333333333 inf\n",
    ),
    "recursion": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(64 << 20)\n"
        "def f(n): return n and 1 + f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(20000))); t.start(); t.join()",
        "",
        "20000\n",
    ),
    "a data base": (
        "import sqlite3\nfor name in (':memory:', 'x.db'):\n"
        "    c = sqlite3.connect(name); c.execute('create table t (a)')\n"
        "    c.execute('insert into t values (7)'); c.commit()\n"
        "    print(c.execute('select a from t').fetchall())",
        "",
        "[(7,)]\n[(7,)]\n",
    ),
    "asyncio": (
        "import asyncio\nasync def main():\n"
        "    print(await asyncio.gather(*(asyncio.sleep(0.01, i) for i in range(3))))\n"
        "asyncio.run(main())",
        "",
        "[0, 1, 2]\n",
    ),
    "select": (
        "import os, select\nr, w = os.pipe(); os.write(w, b'x')\n"
        "print(select.select([r], [], [], 1)[0] == [r])\n"
        "p = select.poll(); p.register(r); print(len(p.poll(10)))\n"
        "e = select.epoll(); e.register(r, select.EPOLLIN); print(len(e.poll(0.01)))",
        "",
        "True\n1\n1\n",
    ),
    "a pair of sockets": (
        "import socket\na, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))",
        "",
        "b'x'\n",
    ),
    "signals": (
        "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: print('rang'))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()\n"
        "signal.signal(signal.SIGUSR1, lambda *a: print('used'))\n"
        "os.kill(os.getpid(), signal.SIGUSR1)",
        "",
        "rang\nused\n",
    ),
    "clocks": (
        "import time, datetime\na = time.perf_counter(); time.sleep(0.001)\n"
        "print(time.perf_counter() > a, time.process_time() > 0, "
        "datetime.datetime.now(datetime.UTC).year > 2000)",
        "",
        "True True True\n",
    ),
    "resources": (
        "import resource, os, platform, getpass\nprint(resource.getrusage(0).ru_maxrss > 0, "
        "os.cpu_count() > 0, platform.system(), os.getcwd() == os.path.realpath('.'))",
        "",
        "True True Linux True\n",
    ),
    "files": (
        "import os, shutil, pathlib\nos.makedirs('a/b'); pathlib.Path('a/b/c').write_text('x')\n"
        "os.chmod('a/b/c', 0o600); os.utime('a/b/c'); shutil.copytree('a', 'd')\n"
        "os.rename('d', 'e')\n"
        "os.symlink('a', 'l'); print(sorted(os.listdir('.')), open('l/b/c').read())\n"
        "shutil.rmtree('a')",
        "",
        "['a', 'e', 'l'] x\n",
    ),
    "the library": (
        "import csv, json, zlib, gzip, bz2, lzma, hashlib, ssl, ctypes, uuid, logging, decimal\n"
        "import pickle, dataclasses, unittest, doctest, zoneinfo, xml.etree.ElementTree as e\n"
        "print(json.loads(gzip.decompress(gzip.compress(b'[1]'))), "
        "len(hashlib.md5(b'').hexdigest()), e.fromstring('<a/>').tag)",
        "",
        "[1] 32 a\n",
    ),
    "a failing exit at the end": (
        "import atexit\natexit.register(lambda: print('end'))\nprint('start')",
        "",
        "start\nend\n",
    ),
}
