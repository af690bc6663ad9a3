"""a micro-batch must leave the last stage before the next one enters the first"""


def finish(times, microbatches):
    return microbatches * sum(times)
