"""Run the benchmarks: ``python -m benchmarks [capture | skipping | steering | storing]``; without a name all of them."""

from benchmarks import capture, skipping, steering, storing
from benchmarks.command import start

SCRIPTS = {"capture": capture.measure, "steering": steering.measure, "skipping": skipping.measure, "storing": storing.measure}

if __name__ == "__main__":
    start(SCRIPTS)
