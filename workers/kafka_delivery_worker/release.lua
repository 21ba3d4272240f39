-- Move the soonest of a delayed set back to its list, at its end. KEYS: delayed set, list; ARGV: how many
local soonest = redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1)
for _, item in ipairs(soonest) do
  redis.call('LPUSH', KEYS[2], item)
  redis.call('ZREM', KEYS[1], item)
end
return #soonest
