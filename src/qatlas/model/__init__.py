"""Floor 4: looking into any nn.Module."""
