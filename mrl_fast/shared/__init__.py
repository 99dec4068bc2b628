"""What training and search share: types, checks, arrays, the choice of an implementation, and the
extension."""
