"""What a model directory says of its model: families, tensor names, adapters."""
