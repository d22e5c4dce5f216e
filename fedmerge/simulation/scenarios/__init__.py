"""What goes wrong on purpose: hostile clients, crashes, lost and late replies."""
