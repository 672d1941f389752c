"""Pictures, maps, labels and folders of them."""
