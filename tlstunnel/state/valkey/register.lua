-- Register a connection as a holder of tunnels, in place of the earlier ones of its instance.
-- KEYS: holders, answers, a list that is used for nothing else. request: instance, holder, a secret if there is none yet.
-- Returns {now, secret, and the replaced holders}. These count until `beat` drops them.
local instance, holder, secret = unpack(request, 1, 3)

-- The first command needs memory and a primary, so that a server that cannot count fails here.
redis.call("HSETNX", KEYS[1], "secret", secret)
-- A user who lacks the right to one of the commands is told here too, rather than with the first limit that needs it.
redis.call("RPUSH", KEYS[3], 1)
redis.call("PEXPIRE", KEYS[3], 1000)
redis.call("LINDEX", KEYS[3], redis.call("LLEN", KEYS[3]) - 1)
redis.call("LPOP", KEYS[3])
redis.call("SET", KEYS[3], redis.call("HGET", KEYS[1], "secret"), "PX", 1000)
redis.call("GET", KEYS[3])
redis.call("DEL", KEYS[3])

local answer = {now, redis.call("HGET", KEYS[1], "secret")}
local fields = redis.call("HGETALL", KEYS[1])
for at = 1, #fields, 2 do
  local name, beat = fields[at], tonumber(fields[at + 1])
  if name ~= "secret" and beat then
    if not is_fresh(beat) then
      redis.call("HDEL", KEYS[1], name)
    elseif string.sub(name, 1, #instance + 1) == instance .. "." then
      redis.call("HSET", KEYS[1], name, -math.abs(beat))
      answer[#answer + 1] = name
    end
  end
end
redis.call("HINCRBY", KEYS[1], holder, now)
redis.call("PEXPIRE", KEYS[1], HOLDERS_TTL)
redis.call("HSET", KEYS[2], "holder", holder)
redis.call("PEXPIRE", KEYS[2], HOLDERS_TTL)
return cmsgpack.pack(answer)
