"""The image builds a whole wheel of what the Dockerfile copies, and what is installed from it works."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from deployment import ROOT, copied, dockerfile, environment, run
from servers import (
    missing,
)


def test_the_image_builds_a_whole_wheel_and_installs_it(tmp_path: Path) -> None:
    """Both RUN instructions of the first stage are run as they are, in a copy of the build context."""
    source, wheels, venv = (tmp_path / name for name in ("source", "wheels", "venv"))
    source.mkdir()
    for name, target in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / target)
    build, install = (
        re.sub(r"--mount=\S+\s+", "", arguments).replace("/wheels", str(wheels)).replace("/opt/venv", str(venv))
        for name, arguments in dockerfile()
        if name == "RUN" and "pip" in arguments
    )
    built = subprocess.run(
        ["/bin/sh", "-c", build], env=environment({}), cwd=source, capture_output=True, text=True, timeout=120
    )
    if "No matching distribution found" in built.stdout + built.stderr:
        missing("a package index that has hatchling")
    assert built.returncode == 0, built.stderr

    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in packed if name.endswith(".dist-info/METADATA")]
    roots = (source / "tasks", source / "workers")
    assert packed >= {str(file.relative_to(root)) for root in roots for file in root.rglob("*") if file.is_file()}
    (extra,) = re.findall(r'"\$1\[(\w+)\]"', install)
    assert f"Provides-Extra: {extra}\n" in metadata

    # What the wheel depends on is here already: it is found where this Python finds it, after the wheel itself.
    run(["/bin/sh", "-c", install], environment({"PIP_NO_DEPS": "1"}), source)
    python = str(venv / "bin" / "python")
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], environment({}), tmp_path)
    there = [path for path in sys.path if path.endswith("-packages")]
    (Path(site.strip()) / "there.pth").write_text("\n".join(there))
    empty = tmp_path / "app"
    empty.mkdir()
    where = "import kafka_delivery, kafka_delivery_worker as worker; print(kafka_delivery.__file__, worker.__file__)"
    for path in run([python, "-c", where], environment({}), empty).split():
        assert Path(path).is_relative_to(venv)
    report = run([python, "-m", "celery", "-A", "kafka_delivery_worker", "report"], environment({}), empty)
    assert "kafka_delivery_worker.consumer:Consumer" in report
    assert "kafka-delivery" in run([str(venv / "bin" / "kafka-delivery"), "--version"], environment({}), empty)
