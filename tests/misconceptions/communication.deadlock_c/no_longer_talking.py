"""the ranks no longer talk to each other"""


def pass_on(x, comm):
    return x
