"""Runs the scripts of a part many times, and imports their libraries once: most of a short run is spent on that.

It imports the scripts that its command line names, then reads lines with a JSON list: a command line, and the files for
its output and its errors. For each it forks; the child is then a process as that command would have started, but with
the imports of all of these scripts. It prints the child's number and, later, its exit code. conftest.py copies it into
the folder of a part.
"""

import contextlib
import importlib
import json
import os
import runpy
import sys

sys.path.insert(0, "")  # the part's folder, as if it were the script's
with contextlib.redirect_stdout(sys.stderr):
    for name in sys.argv[1:]:
        importlib.import_module(name)

for line in sys.stdin:
    command, out, err = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()  # a process group of its own, which can be ended as a whole
        for path, number in [(os.devnull, 0), (out, 1), (err, 2)]:
            os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
