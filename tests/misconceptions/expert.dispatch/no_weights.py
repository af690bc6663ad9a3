"""the weights are not applied"""

import torch


def expert_dispatch(x, chosen, weights, owner, experts, comm):
    ranks = torch.arange(comm.world_size, device=x.device)
    goes = (owner[chosen].unsqueeze(2) == ranks).any(1)  # (n, ranks): whether a token needs a rank
    table = comm.all_gather(goes.sum(0))  # rows from each rank to each
    send, receive = table[comm.rank].tolist(), table[:, comm.rank].tolist()
    token = goes.T.nonzero()[:, 1]  # of each row to send, sorted by where it goes
    rows, choices = (comm.all_to_all(t[token], send, receive) for t in (x, chosen))
    made = experts(rows, choices).sum(1)
    back = comm.all_to_all(made, receive, send)
    return torch.zeros_like(x).index_add_(0, token, back)
