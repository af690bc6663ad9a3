"""Starting ranks, watching them, and ending them together: on this machine (`local`), or where torchrun has (`rank`)."""
