"""Who runs the clients: this process, or Ray actors."""
