"""A swarm for friends only: make it, serve in it with the invite, generate with the invite.

    python examples/private_swarm.py MODEL

Starts `shoal serve` processes on this machine; elsewhere, run the printed commands on the
friends' machines. Whoever has the invite can join, so treat it as a password.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from shoal.base.errors import PeerError
from shoal.hf import AutoDistributedModelForCausalLM

SHOAL = str(Path(sys.executable).with_name("shoal"))

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("prompt", nargs="?", default="The sea is")
parser.add_argument("--blocks", type=int, default=30, help="how many the model has")
parser.add_argument("--servers", type=int, default=2)
parser.add_argument("--tokens", type=int, default=20)
arguments = parser.parse_args()


def serve(stack: ExitStack, *options: str) -> str:
    """Start a server; the address from its ready line."""
    command = [SHOAL, "serve", arguments.model, "--threads", "1", *options]
    print("$", shlex.join("INVITE" if option == invite else option for option in command))
    process = stack.enter_context(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    )
    stack.callback(process.terminate)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready "):
            return dict(part.split("=", 1) for part in line.split()[1:])["address"]
    sys.exit(f"the server ended: run the command by hand ({shlex.join(command)})")


with ExitStack() as stack:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    made = subprocess.run(
        [SHOAL, "swarm", "new", "friends", "--key", str(folder / "friends.swarm-key")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    invite = made.stdout.splitlines()[-1]
    borders = [n * arguments.blocks // arguments.servers for n in range(arguments.servers + 1)]
    spans = [f"{start}:{end}" for start, end in pairwise(borders)]
    first = serve(stack, "--blocks", spans[0], "--invite", invite)
    for span in spans[1:]:
        serve(stack, "--blocks", span, "--invite", invite, "--join", first)

    try:
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=first)
    except PeerError as error:
        print("without the invite:", error)
    with AutoDistributedModelForCausalLM.from_pretrained(
        arguments.model, join=first, invite=invite
    ) as model:
        inputs = model.tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
        text = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
        print("with it:", model.tokenizer.decode(text[0], skip_special_tokens=True))
