def unsupported(*a):
    return "no"
