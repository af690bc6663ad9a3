"""Starting ranks, watching them, and ending them together: on this machine (`local`), on a Ray cluster (`ray`), or in place
where torchrun has started them (`rank`), on one host or several (`cluster`)."""
