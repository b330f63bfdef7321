# SPDX-License-Identifier: Apache-2.0
"""What launch/exit_codes.sh reads and writes of a run in a bucket: `bucket_marks.py VERB gs://BUCKET/RUN [NAME]`.

get NAME, put NAME (from stdin), delete NAME: a file of the folder launch/ there. progress: prints the checkpoints that
are complete. done: exits with 0 if the last stage's result is there, else with 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lionjax.core import bucket
from lionjax.core.errors import UserError


def main(verb: str, run: str, name: str = "") -> int:
    with bucket.explained(run):
        container, path = bucket.parse_name(run)
        store = bucket.open_store(container)
        key = f"{path}/launch/{name}"
        if verb == "get":
            sys.stdout.write(store.read(key).result().value.decode())
        elif verb == "put":
            store.write(key, sys.stdin.read()).result()
        elif verb == "delete":
            store.write(key, None).result()
        else:
            inside = [key.removeprefix(f"{path}/") for key in bucket.keys_under(store, path)]
            complete = sorted(match[1] for key in inside if (match := bucket.COMMITTED.fullmatch(key)))
            if verb == "done":
                return 0 if any(name.startswith("base/") and name.endswith("_final") for name in complete) else 1
            print(*complete, sep="\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
