"""The kinds of sources: each lists shards that can be read alone, and yields the documents of one."""
