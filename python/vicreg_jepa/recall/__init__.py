"""What a memory is for: an agent that sees windows of a maze finds back to what it saw before."""
