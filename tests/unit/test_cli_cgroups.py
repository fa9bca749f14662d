"""Memory limits of control groups, from the files of systems as they are found."""

import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from shoal.cli.cgroups import V1, V2, container_memory, group_limit, memory_groups

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 {root} /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2_MOUNTS = "30 24 0:26 {root} /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n"
V1_OWN = "9:name=systemd:{path}\n4:memory:{path}\n2:cpu,cpuacct:{path}\n0::/\n"
V2_OWN = "0::{path}\n"


@pytest.mark.parametrize(
    ("root", "path", "folder"),
    [
        ("/", "/", "."),
        ("/", "/user.slice/a", "user.slice/a"),  # a plain system
        ("/docker/1f", "/docker/1f", "."),  # a container that sees its own group only
        ("/docker/1f", "/docker/1f/b", "b"),
        ("/../..", "/", "."),  # namespaces that were entered later
        ("/docker/1f", "/elsewhere", "."),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_process_finds_its_groups(version, root, path, folder):
    own = (V1_OWN if version == 1 else V2_OWN).format(path=path)
    mounts = (V1_MOUNTS if version == 1 else V2_MOUNTS).format(root=root)
    group = memory_groups(own, mounts)[0]
    top = PurePosixPath("/sys/fs/cgroup/memory" if version == 1 else "/sys/fs/cgroup")
    assert (group.top, group.folder) == (top, top / folder)
    assert group.files == (V1 if version == 1 else V2)


@pytest.mark.parametrize(
    ("own", "mounts"), [("", ""), ("nonsense\n:::", "x - y\n- -\n"), ("0::/", V1_MOUNTS[:70])]
)
def test_a_system_without_groups_has_none(own, mounts):
    assert memory_groups(own, mounts) == ()


@pytest.mark.parametrize(
    ("limit", "used", "stat", "found"),
    [
        ("1000\n", "400\n", "cache 3\ntotal_inactive_file 100\n", (1000, 700)),
        ("1000", "1100", "", (1000, 0)),  # lowered below what is used
        ("9223372036854771712\n", "400\n", "", None),
        ("max\n", "400\n", "", None),
        ("", "", "", None),
        ("1000", "?", "", None),
    ],
)
def test_what_a_group_leaves(limit, used, stat, found):
    assert group_limit(limit, used, stat, idle_files="total_inactive_file") == found


def write_group(folder, files, limit, used, idle):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files.limit).write_text(f"{limit}\n")
    (folder / files.used).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 3\n{files.idle_files} {idle}\n")


@pytest.mark.parametrize(("files", "none"), [(V1, 9223372036854771712), (V2, "max")])
def test_groups_above_limit_as_well(tmp_path, files, none):
    own, mounts = tmp_path / "cgroup", tmp_path / "mountinfo"
    is_v1 = files is V1
    own.write_text((V1_OWN if is_v1 else V2_OWN).format(path="/a/b"))
    mounts.write_text((V1_MOUNTS if is_v1 else V2_MOUNTS).format(root="/"))
    top = tmp_path / "sys/fs/cgroup" / ("memory" if is_v1 else ".")
    write_group(top, files, none, 9999, 0)
    write_group(top / "a", files, 1000, 400, 100)
    write_group(top / "a/b", files, none, 300, 0)
    found = container_memory(own, mounts, tmp_path)
    assert (found.limit_bytes, found.left_bytes) == (1000, 700)
    write_group(top / "a/b", files, 2000, 1900, 0)
    found = container_memory(own, mounts, tmp_path)
    assert (found.limit_bytes, found.left_bytes) == (1000, 100)
    found = container_memory(tmp_path / "none", mounts, tmp_path)
    assert (found.limit_bytes, found.left_bytes) == (None, None)


def v2_top():
    """Where this system has a tree of version 2 in which we may make groups, with memory or not."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return None
    tops = [line.split()[4] for line in mounts.splitlines() if " - cgroup2 " in line]
    return next((Path(top) for top in tops if os.access(top, os.W_OK)), None)


@pytest.mark.skipif(v2_top() is None, reason="needs a writable tree of version 2 (root)")
def test_a_process_in_a_real_group_of_version_2_finds_it():
    """What the kernel writes, not samples of it; here even without the controller of memory."""
    group = v2_top() / f"shoal-{os.getpid()}"
    group.mkdir()
    code = (
        "from pathlib import Path\n"
        "from shoal.cli.cgroups import V2, container_memory, memory_groups\n"
        "own, mounts = (Path('/proc/self', name).read_text() for name in ('cgroup', 'mountinfo'))\n"
        "print(next(one.folder for one in memory_groups(own, mounts) if one.files is V2))\n"
        "container_memory()\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False,
            preexec_fn=lambda: (group / "cgroup.procs").write_text("0"),
        )  # fmt: skip
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == group.name
