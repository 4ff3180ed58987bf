"""What a disk or a memory refuses is one line for the user; a bug stays a bug."""

import errno
import os

import pytest

from hintsd_jax.errors import UserError, of_the_machine, writing


@pytest.mark.parametrize(
    "error, says",
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "a/b: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", b"a\xff"), "Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), "xxx..."),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (MemoryError(), "memory is out (MemoryError)"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n allocating 9 bytes."), "Out of memory allocating 9 bytes."),
        (RuntimeError("can't start new thread"), "memory is out"),
    ],
)
def test_what_a_machine_refuses_is_one_line(error, says):
    told = str(of_the_machine(error))
    assert says in told and "\n" not in told and len(told) < 800


@pytest.mark.parametrize(
    "error",
    [ConnectionError("reset"), OSError("no number"), OSError(errno.EINVAL, "x"), RuntimeError("x"), ValueError("x")],
)
def test_a_bug_is_told_as_none(error):
    assert of_the_machine(error) is None


def test_what_is_written_has_its_path_in_the_line(tmp_path):
    full = "/dev/full cannot be written .No space left on device.: make room"
    with pytest.raises(UserError, match=full), writing("/dev/full"), open("/dev/full", "w") as file:
        file.write("text")
    with pytest.raises(UserError, match="Is a directory.: give another --out"), writing(tmp_path, "give another --out"):
        tmp_path.write_text("")
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError
