"""What the models are fed: image sources, token shards, and the stream that reads them."""
