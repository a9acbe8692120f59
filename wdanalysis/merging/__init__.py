"""An adapter and its base as one model, tensor by tensor."""
