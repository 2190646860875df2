"""One file a domain: schema, check, implementations, fake kernel, public function. Only here is `_C` imported."""
