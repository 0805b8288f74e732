"""Take part in the trainings of node 0: what the same command does on the other nodes that a platform has started.

The Snakefile starts it there in place of the workflow. Exit code: that of node 0.
"""

import sys

from llava_sft.command_line import Parser
from llava_sft.errors import SettingsError, exits_cleanly
from llava_sft.nodes import this_node
from llava_sft.training.meeting import join


@exits_cleanly
def main() -> None:
    Parser(description=__doc__).parse_args()
    node = this_node()
    if node is None or not node.rank:
        raise SettingsError("this is node 0, or the only one", "make train_X, on every node")
    sys.exit(join(node))


if __name__ == "__main__":
    main()
