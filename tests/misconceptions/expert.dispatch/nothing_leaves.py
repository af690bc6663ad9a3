"""no token leaves its rank"""


def expert_dispatch(x, chosen, weights, owner, experts, comm):
    return (experts(x, chosen) * weights.unsqueeze(2)).sum(1)
