"Run a command and report its wall time and the peak memory of its process tree (PSS: shared pages counted once)."
import subprocess
import sys
import time

import psutil


def pss(process: psutil.Process) -> int:
    "Bytes used by a process and all that it started."
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            info = p.memory_full_info()
            total += getattr(info, 'pss', info.uss)
        except psutil.Error: pass
    return total


start, peak = time.monotonic(), 0
command = subprocess.Popen(sys.argv[1:])
while command.poll() is None:
    try: peak = max(peak, pss(psutil.Process(command.pid)))
    except psutil.Error: pass
    time.sleep(1)
minutes, seconds = divmod(round(time.monotonic() - start), 60)
print(f'{minutes} min {seconds} s, at most {peak / 2**30:.2f} GiB')
sys.exit(command.returncode)
