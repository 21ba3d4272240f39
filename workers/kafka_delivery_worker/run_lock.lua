-- Take, renew or give back the lock of an operator's command.
-- KEYS: lock (string); ARGV: "take", "renew" or "give back", token, how long it lasts (ms)
-- Reply: {1}; if it is another's or, but for "take", nobody's: {0, token of who holds it or "", ms until that ends (-1:
-- never)}
local holder = redis.call('GET', KEYS[1])
if ARGV[1] == 'take' and not holder then
  redis.call('DEL', KEYS[1])  -- needs no memory, so that a full Redis lets a command begin that makes room
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  return {1}
end
-- Also one that is taken again: the reply to the first try was lost.
if holder ~= ARGV[2] then return {0, holder or '', redis.call('PTTL', KEYS[1])} end
if ARGV[1] == 'give back' then redis.call('DEL', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return {1}
