"""Operators, one file each: public function, documentation, validation, fake and autograd."""
