"""a token is sent once for each of its experts, and each copy meets all of them"""

import torch


def expert_dispatch(x, chosen, weights, owner, experts, comm):
    ranks = torch.arange(comm.world_size, device=x.device)
    wants = (owner[chosen].unsqueeze(2) == ranks).sum(1)  # (n, ranks): how many experts of each
    table = comm.all_gather(wants.sum(0))
    send, receive = table[comm.rank].tolist(), table[:, comm.rank].tolist()
    tokens = torch.arange(len(x), device=x.device)
    token = torch.cat([tokens.repeat_interleave(wants[:, rank]) for rank in range(comm.world_size)])
    rows, choices, w = (comm.all_to_all(t[token], send, receive) for t in (x, chosen, weights))
    made = (experts(rows, choices) * w.unsqueeze(2)).sum(1)
    back = comm.all_to_all(made, receive, send)
    return torch.zeros_like(x).index_add_(0, token, back)
