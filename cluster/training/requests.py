"""What the driver asks of ranks while they train. A rank hears it with its next report; all ranks answer at the same step."""

from enum import StrEnum


class Request(StrEnum):
    """What is asked, from the least urgent to the most."""

    NOTHING = ""
    LEAVE_AT_CHECKPOINT = "leave at the next checkpoint"
    LEAVE = "checkpoint and leave"
    STACKS = "write where every thread is"
