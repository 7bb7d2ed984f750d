"""A site's images: manifest, readers, views, and the cache of frozen features."""
