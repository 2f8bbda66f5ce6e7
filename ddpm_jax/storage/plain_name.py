"""A second name for folders whose own name Orbax or TensorStore cannot take.

Orbax searches with patterns made of the path: a folder with `*`, `?` or `[` in its path finds
nothing, or the files of another run. TensorStore takes a backslash for a slash, and only UTF-8.
Such a folder is opened through a symbolic link with a plain name, in the system's folder for
temporary files. The links stay: another process may be using them.
"""

import hashlib
import os
import stat
import tempfile
import threading
from pathlib import Path

from etils import epath

from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import writing

LONG = 3000
"""Paths have at most 4,096 bytes on Linux, and Orbax's files lie some hundred below the folder."""


def plain_name(folder: epath.Path) -> epath.Path:
    """A path to the absolute `folder`, which exists, that Orbax can take: often `folder` itself.

    Raises UserError if the link cannot be made, or for a bucket with such a name.
    """
    name = os.fspath(folder)
    if _is_plain(name):
        return folder
    if "://" in name:
        raise UserError(
            f"{folder}: checkpoints cannot be kept in a bucket under a name with *, ?, [ or \\; "
            "choose another path"
        )
    links = Path(_folder_for_links()) / f"ddpm_jax-{os.getuid()}"
    # The same in all processes of a program: Orbax compares their paths.
    link = links / hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    with writing(link):
        links.mkdir(mode=0o700, exist_ok=True)
        about = links.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            raise UserError(
                f"{links}: belongs to somebody else, and {folder} needs it for a link; "
                "set TMPDIR to a folder of your own"
            )
        if not link.is_symlink() or os.readlink(link) != name:
            temporary = link.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            temporary.symlink_to(name)
            temporary.replace(link)
    return epath.Path(link)


def _is_plain(name: str) -> bool:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    # path_of puts // before a local folder /s3, which TensorStore does not take.
    return size <= LONG and not name.startswith("//") and not set("*?[\\") & set(name)


def _folder_for_links() -> str:
    own = tempfile.gettempdir()
    return own if _is_plain(own) else "/tmp"
