"""Hostfiles: each is read as DeepSpeed reads it, or refused in one line that names file, line and what to do."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from ds_moe.errors import UserError
from ds_moe.launcher.hostfile import is_here, read_hostfile

AB = {"node-a": 8, "node-b": 8}
FORM = 'write "name slots=N"'
NOT_READ = "put a # before it"
NOT_ONE = "is not the name of one host"
NO_COUNT = "does not say how many processes"
NO_NUMBER = "is not a number of processes"

# name -> (content, what is read, or (line, words of the refusal))
FILES = {
    "plain": ("node-a slots=8\nnode-b slots=8\n", AB),
    "no newline at the end": ("node-a slots=8\nnode-b slots=8", AB),
    "indented comment": ("  # rack 1\nnode-a slots=8\n\t# rack 2\nnode-b slots=8\n", AB),
    "comment behind an entry": ("node-a slots=8 # rack 1\nnode-b\tslots=8# rack 2\n", AB),
    "comment of a whole entry": ("node-a slots=8\n#node-c slots=8\nnode-b slots=8\n", AB),
    "CRLF": ("# from a desktop\r\nnode-a slots=8\r\n\r\nnode-b slots=8\r\n", AB),
    "CR alone": ("node-a slots=8\rnode-b slots=8\r", AB),
    "tabs": ("\tnode-a\t\tslots=8\t\nnode-b \t slots=8\n", AB),
    "spaces around": ("   node-a    slots=8   \nnode-b slots=8 \n", AB),
    "no-break space": ("node-a\u00a0slots=8\nnode-b\u2003slots=8\n", AB),
    "blank lines": ("\n\n  \nnode-a slots=8\n\t\nnode-b slots=8\n\n", AB),
    "form feed": ("\x0cnode-a slots=8\nnode-b\x0cslots=8\n", AB),
    "zeros in front": ("node-a slots=08\nnode-b slots=008\n", AB),
    "digits of another script": ("node-a slots=\uff18\nnode-b slots=\u0668\n", AB),
    "MPI's other words": ("node-a slots=8 max_slots=8\nnode-b slots=8 max-slots=16 # all\n", AB),
    "user names": ("me@node-a slots=8\nroot@10.0.0.2 slots=4\n", {"me@node-a": 8, "root@10.0.0.2": 4}),
    "uneven": ("node-a slots=1\nnode-b slots=16\n", {"node-a": 1, "node-b": 16}),
    "dots and underscores": ("gpu_1.example. slots=2\n10.0.0.3 slots=2\n", {"gpu_1.example.": 2, "10.0.0.3": 2}),
    "a long comment": ("#" + "x" * 10**6 + "\nnode-a slots=8 #" + "y" * 10**6 + "\nnode-b slots=8\n", AB),
    "many hosts": ("".join(f"n{i} slots=1\n" for i in range(2000)), {f"n{i}": 1 for i in range(2000)}),
    "names that differ in case": ("node-a slots=8\nNode-A slots=8\n", {"node-a": 8, "Node-A": 8}),
    "no slots": ("node-a\nnode-b\n", (1, NO_COUNT)),
    "slots of one missing": ("node-a slots=8\nnode-b\n", (2, NO_COUNT)),
    "slots without a number": ("node-a slots=\n", (1, NO_COUNT)),
    "slots in words": ("node-a slots=eight\n", (1, NO_COUNT)),
    "a negative number": ("node-a slots=-8\n", (1, NO_COUNT)),
    "spaces around =": ("node-a slots = 8\n", (1, NO_COUNT)),
    "capitals": ("node-a SLOTS=8\n", (1, NO_COUNT)),
    "host:slots": ("node-a:8\n", (1, NO_COUNT)),
    "slots only": ("slots=8\n", (1, NO_COUNT)),
    "max_slots first": ("node-a max_slots=8 slots=8\n", (1, NO_COUNT)),
    "zero": ("node-a slots=8\nnode-b slots=0\n", (2, NO_NUMBER)),
    "very many": ("node-a slots=80000\n", (1, NO_NUMBER)),
    "more digits than Python reads": ("node-a slots=" + "9" * 5000 + "\n", (1, NO_NUMBER)),
    "a fraction": ("node-a slots=8.5\n", (1, NOT_READ)),
    "a list of GPUs": ("node-a slots=0,1,2\n", (1, NOT_READ)),
    "letters after the number": ("node-a slots=8gpus\n", (1, NOT_READ)),
    "text behind an entry": ("node-a slots=8 rack 1\n", (1, NOT_READ)),
    "two entries on a line": ("node-a slots=8 node-b slots=8\n", (1, NOT_READ)),
    "slots twice": ("node-a slots=8 slots=4\n", (1, NOT_READ)),
    "a host twice": ("node-a slots=8\n\nnode-a slots=8\n", (3, "node-a is on line 1 already")),
    "a host with other slots": ("node-a slots=8\nnode-b slots=1\nnode-a slots=4\n", (3, "node-a is on line 1 already")),
    "byte order mark": ("\ufeffnode-a slots=8\n", (1, "byte order mark")),
    "byte order mark before a comment": ("\ufeff# rack 1\nnode-a slots=8\n", (1, "byte order mark")),
    "zero-width space": ("node-a\u200b slots=8\n", (1, NOT_ONE)),
    "a range, which pdsh would expand": ("node-[1-4] slots=8\n", (1, NOT_ONE)),
    "hosts in one word": ("node-a,node-b slots=8\n", (1, NOT_ONE)),
    "an option": ("-oProxyCommand=touch slots=8\n", (1, NOT_ONE)),
    "a command": ("node-a$(touch${IFS}pwned) slots=8\n", (1, NOT_ONE)),
    "an IPv6 address, whose colons pdsh takes for its own": ("fe80::1 slots=8\n", (1, NOT_ONE)),
    "NUL": ("node-a\0 slots=8\n", (1, NOT_ONE)),
    "a colour": ("\x1b[31mnode-a slots=8\n", (1, NOT_ONE)),
    "a long line": ("x" * 10**6 + "\n", (1, NO_COUNT)),
    "empty": ("", (None, "names no host")),
    "comments only": ("# node-a slots=8\n  # node-b slots=8\n", (None, "names no host")),
    "blank": (" \n\t\n", (None, "names no host")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostfile_is_read_as_deepspeed_reads_it_or_refused_in_one_line(name, tmp_path):
    content, expected = FILES[name]
    file = tmp_path / "hosts"
    file.write_bytes(content.encode())
    if isinstance(expected, dict):
        assert read_hostfile(str(file)) == expected == dict(fetch_hostfile(str(file)))
        return
    line, words = expected
    with pytest.raises(UserError) as refused:
        read_hostfile(str(file))
    message = str(refused.value)
    assert message.startswith(f"--hostfile {file}" + (f":{line}" if line else " ")) and words in message
    assert message.isprintable() and len(message) < 300 + len(str(file))


def test_what_is_no_file_of_text_is_refused_in_one_line(tmp_path):
    (tmp_path / "latin").write_bytes("node-\xe4 slots=8\n".encode("latin-1"))
    for path, words in {
        tmp_path / "nowhere": "no such file",
        tmp_path: "is not a regular file",
        Path("/dev/null"): "is not a regular file",
        tmp_path / "latin": "cannot be read: 'utf-8' codec",
        Path("/proc/self/mem"): "cannot be read: ",  # root may read every other file
    }.items():
        with pytest.raises(UserError, match=f"^--hostfile {path}:? {words}") as refused:
            read_hostfile(str(path))
        assert str(refused.value).isprintable()


def test_a_host_is_here_if_one_of_its_addresses_is():
    assert is_here("localhost") and is_here("me@127.0.0.1")
    assert not is_here("192.0.2.7") and not is_here("no-such-host.invalid")
