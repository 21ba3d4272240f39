-- Park one item, once. KEYS: items (hash), index (sorted set); ARGV: id, digest of its content, time (ms), item (JSON)
-- Returns the id under which it lies.
local id = ARGV[1]
local namesake = id .. '~' .. string.sub(ARGV[2], 1, 8)  -- the same id, another content: a caller reused it; both stay
local held = redis.call('HGET', KEYS[1], id)
-- Found as text: quotes within strings are escaped, so this can only be the field itself.
local another = held and not string.find(held, '"digest": "' .. ARGV[2] .. '"', 1, true)
if another or redis.call('HEXISTS', KEYS[1], namesake) == 1 then id = namesake end
redis.call('HSET', KEYS[1], id, ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[3], id)
return id
